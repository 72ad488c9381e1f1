"""What is measured and tried out by hand: faults, chaos."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))  # private ssh servers: sshd.py
