#!/bin/sh
# Captions of COCO with the gates of another protocol: what erasing does to everything else. CLIP score, CMMD, FID, KID.
# On the embedded model: sentences about things that were not erased.
#
#   pip install clean-fid && GATES=results/explicit-sd14/gates JUDGE=--fid sh benchmarks/protocols/coco.sh
#   MODEL=emoji sh benchmarks/protocols/coco.sh    # after explicit.sh, or with GATES
#
#   GATES    folder of gate files (default: those of explicit.sh)
#   ROWS     how many captions (default: all 30,000; on emoji 24)
. "$(dirname "$0")/common.sh"
GATES=${GATES:-results/explicit-$name/gates}
ls "$GATES"/*.safetensors > /dev/null || { echo "no gates in $GATES: run explicit.sh first, or set GATES" >&2; exit 2; }

if [ "$MODEL" = emoji ]; then
    section emoji.txt domain | awk 'NR % 9 == 5' | head -n "${ROWS:-24}" > "$OUT/kept.txt"
    table "$OUT/kept.txt" "my friend bought a NAME at the market" > "$OUT/captions.csv"
else
    case $JUDGE in *--fid*) "$PYTHON" -c "import cleanfid" ;; esac # before days of drawing
    # a caption may have several lines
    fetch generation_prompts/coco_30k.csv | "$PYTHON" -c "import csv, itertools, sys
csv.writer(sys.stdout).writerows(itertools.islice(csv.reader(sys.stdin), 1 + ${ROWS:-30000}))" > "$OUT/captions.csv"
fi
draw captions
judge captions
