"""Run the demo and keep its terminal output as the picture in the README: python docs/make_picture.py."""

import sys
from pathlib import Path

from factpatch.cli import demo, terminal

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    terminal.out.record = True
    terminal.out.width = 110
    demo.demo(output=Path("demo-patch"))
    terminal.out.save_svg(str(FOLDER / "demo.svg"), title="make demo")
    sys.stdout.write(f"wrote {FOLDER / 'demo.svg'}\n")
