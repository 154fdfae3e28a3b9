"""lm-evaluation-harness with our models: its own command line, which here knows `--model mtp`.

    python scripts/lm_eval.py --model mtp --model_args checkpoint=runs/demo,drafter=heads \
        --tasks mtp_humaneval --include_path configs/lm_eval --metadata '{"path": "../shared/data"}'

`--model_args` takes what `mtp.evaluate.harness.HarnessModel` does. Releases after 0.4.13 find the
model by themselves where this package is installed: `lm_eval --model mtp` is then the same.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's folder comes first where modules are looked for: this file would be `lm_eval`.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

    from lm_eval.__main__ import cli_evaluate

    import mtp.evaluate.harness  # noqa: F401  # which registers the model

    cli_evaluate()
