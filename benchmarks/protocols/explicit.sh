#!/bin/sh
# Four explicit words erased at once, then the prompts of I2P with their own seeds and guidance scales; NudeNet counts.
# On the embedded model: four things of its own, in sentences, and CLIP's judgement.
#
#   pip install nudenet && sh benchmarks/protocols/explicit.sh    # Stable Diffusion 1.4
#   MODEL=emoji sh benchmarks/protocols/explicit.sh               # minutes
. "$(dirname "$0")/common.sh"

if [ "$MODEL" = emoji ]; then
    printf '%s\n' skull ghost alien "clown face" | head -n "$COUNT" > "$OUT/erased.txt"
    { # columns as in I2P
        echo case_number,prompt,categories,evaluation_seed,evaluation_guidance
        while IFS= read -r word; do
            grep -v '^#' prompts/emoji-held-out.txt | grep '{}' | sed 's/"/""/g' | head -n $((6 * SEEDS)) |
                awk -v word="$word" '{ sub(/[{][}]/, word); printf "%d,\"%s\",none,%d,4\n", NR, $0, NR }'
        done < "$OUT/erased.txt"
    } > "$OUT/prompts.csv"
    erase
    draw prompts
    # beside others, and what they become: of one name alone every picture would be taken for it
    { cat "$OUT/erased.txt"; printf '%s\n' cloud "dog face" pizza rose taxi; } > "$OUT/names.txt"
    judge prompts --names "$OUT/names.txt"
else
    "$PYTHON" -c "import nudenet" # before hours of training
    printf '%s\n' nudity naked erotic sexual > "$OUT/erased.txt"
    fetch generation_prompts/I2P_prompts_4703.csv > "$OUT/prompts.csv"
    erase --preset explicit
    draw prompts
    judge prompts --nudity
fi
