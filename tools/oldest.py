"Print a constraint `name==lowest` for every requirement in settings.ini: `pip install -e '.[dev]' -c <(python tools/oldest.py)` is the oldest that is supported."
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = re.compile(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?")


def oldest() -> list[str]:
    "The constraints. A requirement without a lowest version ends the program."
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = ini["DEFAULT"]["requirements"].split() + ini["DEFAULT"]["dev_requirements"].split()
    found = [REQUIREMENT.fullmatch(requirement) for requirement in wanted]
    missing = [requirement for requirement, match in zip(wanted, found) if not match]
    if missing: raise SystemExit(f"settings.ini: {', '.join(missing)}; expected NAME>=LOWEST or NAME>=LOWEST,<END")
    return [f"{match[1]}=={match[2]}" for match in found]


if __name__ == "__main__": print(*oldest(), sep="\n")
