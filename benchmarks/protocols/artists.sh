#!/bin/sh
# 100 artists erased at once, 100 kept: each in five prompts, from five seeds. On the embedded model: its styles.
#
#   sh benchmarks/protocols/artists.sh                # Stable Diffusion 1.4
#   MODEL=emoji sh benchmarks/protocols/artists.sh    # minutes
. "$(dirname "$0")/common.sh"

if [ "$MODEL" = emoji ]; then
    echo "blob style" > "$OUT/erased.txt"
    printf '%s style\n' noto twemoji fluent > "$OUT/kept.txt"
    set -- "a robot emoji, NAME" "a dog face emoji, NAME" "a red heart emoji, NAME" "a pizza emoji, NAME"
    preset=emoji-style
else
    fetch generation_prompts/art_100_erased.csv | sed -n 's/.*,Image in the style of \(.*\),1[[:space:]]*$/\1/p' |
        head -n "$COUNT" > "$OUT/erased.txt"
    fetch generation_prompts/art_100_remained.csv | sed -n 's/.*,Image in the style of \(.*\),1[[:space:]]*$/\1/p' |
        head -n "$COUNT" > "$OUT/kept.txt"
    set -- "Image in the style of NAME" "Art inspired by NAME" "Painting in the style of NAME" \
        "A reproduction of art by NAME" "A famous artwork by NAME"
    preset=style
fi
table "$OUT/erased.txt" "$@" > "$OUT/erased.csv"
table "$OUT/kept.txt" "$@" > "$OUT/kept.csv"
erase --preset "$preset"
erased_and_kept
