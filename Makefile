# The usual verbs; each is one line that also works by hand.
.PHONY: install check format test slow bench docs clean

# What a package re-exports is documented there; these also have modules to import from.
API = diffusiongemma $(addprefix diffusiongemma., constraints models sampling sampling.batching sampling.chat \
	sampling.decide sampling.watch checkpoints data diffusion distillation \
	evaluation parallel view)

install:  ## the package with what tests and docs need
	pip install -e '.[test,docs]'

check:  ## format, lint, types: seconds
	ruff format --check .
	ruff check .
	mypy

format:
	ruff format .
	ruff check --fix .

test:  ## the default tests
	python -m pytest -q

slow:  ## what takes minutes each: notebooks, whole runs, README's main job
	python -m pytest -q -m slow

bench:  ## cost of each pass, the decode modes against each other
	python benchmarks/sampler.py --checkpoint=builtin

docs:  ## the API reference from the docstrings, into build/api
	pdoc --docformat google --output-directory build/api $(API) '!diffusiongemma.data.tfds_builders'

clean:
	rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
