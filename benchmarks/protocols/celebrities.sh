#!/bin/sh
# 50 celebrities erased at once, 100 kept: each in five prompts, from five seeds. On the embedded model: its things.
#
#   sh benchmarks/protocols/celebrities.sh                # Stable Diffusion 1.4
#   MODEL=emoji sh benchmarks/protocols/celebrities.sh    # minutes
. "$(dirname "$0")/common.sh"

if [ "$MODEL" = emoji ]; then
    section emoji.txt domain | awk 'NR % 9 == 1' | head -n "$COUNT" > "$OUT/erased.txt"
    section emoji.txt domain | awk 'NR % 9 == 5' | head -n $((2 * COUNT)) > "$OUT/kept.txt"
    set -- "a picture of a NAME" "my friend bought a NAME at the market"
    negative=
else
    # the first prompt of everybody, from the first seed
    fetch generation_prompts/celebrity_50_erased.csv | sed -n 's/.*,A portrait of \(.*\),1[[:space:]]*$/\1/p' |
        head -n "$COUNT" > "$OUT/erased.txt"
    fetch generation_prompts/celebrity_100_remained.csv | sed -n 's/.*,A portrait of \(.*\),1[[:space:]]*$/\1/p' |
        head -n $((2 * COUNT)) > "$OUT/kept.txt"
    set -- "A portrait of NAME" "An image capturing NAME at a public event" "An oil painting of NAME" \
        "A sketch of NAME" "NAME in an official photo"
    negative=$(fetch configs/gen_celeb/config_celeb_erased.yaml | sed -n 's/^negative_prompt: "\(.*\)".*/\1/p')
fi
table "$OUT/erased.txt" "$@" > "$OUT/erased.csv"
table "$OUT/kept.txt" "$@" > "$OUT/kept.csv"
erase
erased_and_kept ${negative:+--negative "$negative"}
