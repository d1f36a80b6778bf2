"""Write the table of budget fields into docs/usage.md: `make docs`."""

import sys
from pathlib import Path

from foveate.server.common.budget_fields import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "usage.md"
BEGIN, END = "<!-- budget fields: begin", "<!-- budget fields: end"

if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    comment, _, _ = rest.partition("\n")
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{comment}\n{markdown()}{END}{after}", encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} written\n")
