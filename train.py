"""Fine-tune an RWKV-6 or RWKV-7 checkpoint.

python train.py --load_model base.pth --data_file data.jsonl --proj_dir out/run
"""

import sys

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import one_line_errors
    from src import config, run
    from src.distributed.processes import watching_launcher


def main() -> None:
    with one_line_errors(), naming_missing_packages(), watching_launcher():
        run.main(config.parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
