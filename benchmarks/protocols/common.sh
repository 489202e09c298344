# What the protocols share; sourced by each of them. docs/protocols.md says what they measure.
#
#   MODEL    sd14 (default), emoji, or anything that --model takes
#   OUT      folder of all that is made (default: results/<protocol>-<model>); a run goes on where it stopped
#   DEVICE   cpu (default), cuda or mps
#   COUNT    how many names are erased (default: all; on emoji 4); twice as many are kept
#   SEEDS    pictures of every prompt, from seeds 1, 2, ... (default: 5; on emoji 1)
#   STEPS    denoising steps (default: the model's own)
#   CLIP     who judges (default: openai/clip-vit-base-patch32, as in the authors' code; of emoji its own)
#   JUDGE    more options of `evaluate`, such as --fid

set -eu
cd "$(dirname "$0")/../.."
MODEL=${MODEL:-sd14} DEVICE=${DEVICE:-cpu} PYTHON=${PYTHON:-python} STEPS=${STEPS:-} JUDGE=${JUDGE:-}
CLIP=${CLIP:-openai/clip-vit-base-patch32}
name=$(basename "$MODEL") protocol=$(basename "$0" .sh)
OUT=${OUT:-results/$protocol-$name}
[ "$MODEL" = emoji ] && COUNT=${COUNT:-4} SEEDS=${SEEDS:-1}
COUNT=${COUNT:-100000} SEEDS=${SEEDS:-5}
AUTHORS=https://raw.githubusercontent.com/Hyun1A/CPE/4d35d026a261a493f31af664afc3f1ad4a7bc58c
mkdir -p "$OUT"

cpe() { # COMMAND ...
    echo "$ cpe.py $1"
    "$PYTHON" cpe.py "$@" --device "$DEVICE"
}

fetch() { # PATH: a file of the authors' repository, in $OUT; it has no licence, so it is read there and not kept here
    file=$OUT/$(basename "$1")
    [ -s "$file" ] || { curl -fsSL --retry 3 -o "$file.part" "$AUTHORS/$1" && mv "$file.part" "$file"; }
    cat "$file"
}

section() { # FILE HEADING: the lines of a section of prompts/FILE
    awk -v heading="[$2]" '/^\[/ { inside = $0 == heading; next } inside && NF && !/^#/' "prompts/$1"
}

table() { # NAMES FORM ...: a CSV of every name, in place of NAME, in every form, from every seed
    names=$1
    shift
    echo prompt,evaluation_seed
    while IFS= read -r each; do
        for form in "$@"; do
            prompt=$(printf %s "${form%%NAME*}$each${form#*NAME}" | sed 's/"/""/g')
            for seed in $(seq "$SEEDS"); do echo "\"$prompt\",$seed"; done
        done
    done < "$names"
}

draw() { # PART OPTION ...: the pictures of $OUT/PART.csv, without gates and with them
    part=$1
    shift
    set -- "$@" ${STEPS:+--steps "$STEPS"}
    set -- "$@" --model "$MODEL"
    cpe generate --prompts "$OUT/$part.csv" --out "$OUT/$part-before" "$@"
    cpe generate --prompts "$OUT/$part.csv" --out "$OUT/$part-after" "$@" "$GATES"/*.safetensors
}

judge() { # PART OPTION ...: one table before, one after, which is compared with before
    part=$1
    shift
    if [ "$MODEL" = emoji ]; then set -- "$@" --model emoji; else set -- --clip "$CLIP" "$@"; fi
    plain=$(echo "$JUDGE" | sed 's/--fid//') # there is nothing to compare with before
    cpe evaluate "$OUT/$part-before" --json "$OUT/$part-before.json" "$@" $plain
    cpe evaluate "$OUT/$part-after" --json "$OUT/$part-after.json" --reference "$OUT/$part-before" "$@" $JUDGE
}

erase() { # OPTION ...: gates of all names in $OUT/erased.txt, trained as published; on emoji solved for
    GATES=$OUT/gates
    [ "$MODEL" = emoji ] || set -- "$@" --published
    cpe train --targets "$OUT/erased.txt" --out "$GATES" --model "$MODEL" "$@"
}

erased_and_kept() { # OPTION ...: of `generate`; draws and judges both lists by all names
    cat "$OUT/erased.txt" "$OUT/kept.txt" > "$OUT/names.txt"
    for list in erased kept; do
        draw "$list" "$@"
        judge "$list" --names "$OUT/names.txt"
    done
}
