"""The largest batch that fits."""

from collections.abc import Callable

from diffusiongemma.planning.compiler import Plan


def largest_that_fits(
    rows: int, least: int, plan: Callable[[int], list[Plan]]
) -> tuple[int, list[Plan]]:
    """Doubles the rows until they no longer fit, or halves them until they do.

    Args:
      rows: to start with.
      least: what a batch has to be a multiple of.
      plan: compiles the programs for so many rows.

    Returns:
      The largest batch seen to fit, at most twice less than what fits, and its plans; where none
      fits, the smallest and its plans.
    """
    plans = plan(rows)
    if _fit(plans):
        while _fit(larger := plan(2 * rows)):
            rows, plans = 2 * rows, larger
        return rows, plans
    while not _fit(plans) and rows % 2 == 0 and (rows // 2) % least == 0:
        rows //= 2
        plans = plan(rows)
    return rows, plans


def _fit(plans: list[Plan]) -> bool:
    return all(plan.fits for plan in plans)
