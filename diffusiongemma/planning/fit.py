"""Searches for the largest batch that fits."""

from collections.abc import Callable

from diffusiongemma.planning.compiler import Plan


def largest_that_fits(
    rows: int, multiple: int, plan: Callable[[int], list[Plan]]
) -> tuple[int, list[Plan]]:
    """Doubles the number of rows until the programs do not fit, or halves it until they do.

    Args:
      rows: the number of rows to start with.
      multiple: the number that must divide the number of rows.
      plan: a function that compiles the programs for a number of rows.

    Returns:
      The largest number of rows that was found to fit, and its plans. The true maximum is less than
      twice as large. If none fits, the smallest number that was tried, and its plans.
    """
    plans = plan(rows)
    if _fit(plans):
        while _fit(larger := plan(2 * rows)):
            rows, plans = 2 * rows, larger
        return rows, plans
    while not _fit(plans) and rows % 2 == 0 and (rows // 2) % multiple == 0:
        rows //= 2
        plans = plan(rows)
    return rows, plans


def _fit(plans: list[Plan]) -> bool:
    return all(plan.fits for plan in plans)
