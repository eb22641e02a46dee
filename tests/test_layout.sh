#!/usr/bin/env bash
# The order of ckca.h: every tag of the contents stands once at its section, every section has a tag, and the sections
# come in the order of the contents. Library code holds no conditional of the backend but the one in SHARED.
set -u
cd "$(dirname "$0")/.."
passed=0
failed=0
check() { # check STATUS TEXT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAIL: $2"; fi
}

manual=$(awk '/\*\// { print NR; exit }' ckca.h)
contents=$(head -n "$manual" ckca.h | grep -o '>>[a-z]*[a-z]\b' | sort)
for tag in $contents; do
    check $(($(grep -c -- "$tag\$" ckca.h) != 1)) "$tag ends one line of ckca.h, a section's"
    check $(($(grep -o -- "$tag\b" ckca.h | wc -l) != 2)) "$tag stands in ckca.h twice: in the contents and at its section"
done
sections=$(tail -n +"$manual" ckca.h | grep -oE '^   [A-Z][A-Z:, ]* +>>[a-z]+$' | grep -o '>>[a-z]*')
check $(($(echo "$sections" | wc -l) != $(echo "$contents" | wc -l))) "as many sections as tags in the contents"
[ "$sections" = "$(head -n "$manual" ckca.h | grep -o '>>[a-z]*[a-z]\b')" ]
check $? "the sections come in the order of the contents"
bars=$(grep -c '^/\* =\{100,\}$' ckca.h)
check $((bars != $(echo "$sections" | wc -l))) "every section ($bars) has a tag"
check $(($(grep -cE '^#.*\bCKCA_CUDA\b' ckca.h) != 1)) "one conditional on CKCA_CUDA"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
