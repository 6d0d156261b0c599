# shellcheck shell=bash
# What the launch scripts share: --dry-run, --help, quoting, errors. Sourced, never run.
#
# A script that sources it has its usage in the comment at its top and its flags for
# launch/train.py in the array TRAIN.

DRY_RUN=no
WORDS=()

# fail SENTENCE: ends the script for a mistake in its edited lines or on its command line.
fail() {
  echo "error: $*" >&2
  exit 2
}

# usage: the comment at the top of the script, without its marks.
usage() {
  sed -n '2,/^[^#]*$/s/^# \{0,1\}//p' "$0"
}

# options WORD...: takes --dry-run and --help out of the words; what is left is in WORDS.
options() {
  local word
  for word in "$@"; do
    case $word in
      --dry-run) DRY_RUN=yes ;;
      -h | --help) usage && exit 0 ;;
      -*) fail "$word is not an option; there are --dry-run and --help." ;;
      *) WORDS+=("$word") ;;
    esac
  done
}

# quoted WORD...: the words on one line, as one would type them.
quoted() {
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=("$word")
  done
  echo "${line[*]}"
}

# run COMMAND...: runs it; --dry-run prints it instead.
run() {
  if [[ $DRY_RUN = yes ]]; then quoted "$@"; else "$@"; fi
}

# edited NAME EXAMPLE: ends the script where the variable NAME was left empty.
edited() {
  [[ -n ${!1} ]] || fail "$1 is empty; edit it at the top of $0, as $1='$2'."
}

# edited_workdir PREFIX: ends the script unless TRAIN names a folder that all machines reach.
edited_workdir() {
  local flag
  for flag in "${TRAIN[@]}"; do
    [[ $flag != --workdir="$1"?* ]] || return 0
  done
  fail "TRAIN has no --workdir=$1…; edit it at the top of $0 (all machines must reach the folder)."
}
