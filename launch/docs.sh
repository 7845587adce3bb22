#!/usr/bin/env bash
# The site of docs/: every page, the options and the commands, with a search.
#
#   bash launch/docs.sh          builds it into build/site; a link that leads nowhere is an error
#   bash launch/docs.sh serve    shows it at http://127.0.0.1:8000, and builds it again as pages change
#
# It is a folder of files: any web server shows it, and no page asks another server for anything.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

(($# <= 1)) && [[ ${1:-serve} == serve ]] || die 'usage: bash launch/docs.sh [serve]'
install --editable '.[docs]'
cd "$root"
export NO_MKDOCS_2_WARNING=1 # an advertisement
"$python" -m mkdocs "${1:-build}" --strict --config-file launch/site/mkdocs.yml
[[ -n ${1:-} ]] || say "The site lies in $root/build/site; bash launch/docs.sh serve shows it."
