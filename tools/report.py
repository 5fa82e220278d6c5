# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""One page with the curves, heat maps, losses and photographs of one run or several.

python tools/report.py WORK_DIR [WORK_DIR ...] [--out DIR]
"""

from mmseg_sats.visualization.report.page import main

if __name__ == '__main__':
    main()
