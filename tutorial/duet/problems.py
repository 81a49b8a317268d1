"""Fresh sheets of sums as problems for `python -m minihogwild.evaluate`: a line of JSON each, on standard output.

python tutorial/duet/problems.py --sheets 20 > sums.jsonl
"""

import argparse
import json
import random

from evaluate import SEED
from sheets import make_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheets", type=int, default=20)
    parser.add_argument("--lines", type=int, default=12, help="of a sheet")
    options = parser.parse_args()
    rng = random.Random(SEED)
    for _ in range(options.sheets):
        sheet = make_sheet(rng, options.lines)
        answers = [[f"{name} = {value}"] for name, value in sheet.values.items()]
        print(json.dumps({"problem": str(sheet), "answers": answers}))


if __name__ == "__main__":
    main()
