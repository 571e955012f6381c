"The package's metadata. Everything that may change lives in settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
ini = ConfigParser()
ini.read(root / "settings.ini", encoding="utf-8")
cfg, readme = ini["DEFAULT"], root / "README.md"

status = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}[cfg["status"]]
oldest = int(cfg["min_python"].split(".")[1])
classifiers = [f"Development Status :: {status}", f"Intended Audience :: {cfg['audience']}", f"Natural Language :: {cfg['language']}",
               "Topic :: Scientific/Engineering :: Artificial Intelligence",
               "Programming Language :: Python :: 3", *(f"Programming Language :: Python :: 3.{minor}" for minor in range(oldest, 14))]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license_expression={"apache2": "Apache-2.0"}[cfg["license"]], license_files=["LICENSE"], classifiers=classifiers,
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "", long_description_content_type="text/markdown",
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    entry_points={"console_scripts": cfg["console_scripts"].split("\n"), "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
