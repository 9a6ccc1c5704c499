# shellcheck shell=bash
# Functions and variables of the launch scripts, which source this file.

# shellcheck disable=SC2034  # read by the scripts that source this file
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=''
config=''
workdir=''
flags=()
# shellcheck disable=SC2034
staged=''

# Reads [--dry_run] CONFIG WORKDIR [flags].
parse_arguments() {
  if [[ "${1:-}" == '--dry_run' ]]; then
    dry_run=yes
    shift
  fi
  if (($# < 2)); then
    echo "usage: $0 [--dry_run] CONFIG WORKDIR [flags of diffusiongemma.distill]" >&2
    exit 2
  fi
  config=$1
  # shellcheck disable=SC2034
  workdir=$2
  shift 2
  # shellcheck disable=SC2034
  flags=("$@")
  if [[ ! -f "$config" ]]; then
    echo "error: no config file $config" >&2
    exit 1
  fi
}

# Copies the project's files, except .git, ignored files and virtual environments, to a new directory
# and sets `staged` to its name. A dry run only sets the name.
stage() {
  staged=$(mktemp -u -d)/diffusiongemma
  if [[ -n "$dry_run" ]]; then
    return
  fi
  mkdir -p "$staged"
  local excluded=(--exclude=.git) environment
  while IFS= read -r environment; do
    excluded+=("--exclude=$environment")
  done < <(cd "$root" && find . -name pyvenv.cfg -printf '%h\n')
  if git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git -C "$root" ls-files -z --cached --others --exclude-standard |
      sed -z 's|^|./|' >"$staged.files"
    tar -c -C "$root" --null --ignore-failed-read "${excluded[@]}" -T "$staged.files" 2>/dev/null |
      tar -x -C "$staged"
    rm "$staged.files"
  else
    tar -c -C "$root" "${excluded[@]}" . | tar -x -C "$staged"
  fi
}

# Prints the command of each TPU host, with LIBTPU_INIT_ARGS (flags of the TPU compiler) if that is set.
on_tpu() {
  if [[ -n "${LIBTPU_INIT_ARGS:-}" ]]; then
    quoted env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" "$@"
  else
    quoted "$@"
  fi
}

# Prints the arguments as one line, quoted so that a shell reads them back as the same arguments.
quoted() {
  local line
  line=$(printf '%q ' "$@")
  echo "${line% }"
}

# Prints a command and, unless this is a dry run, runs it.
run() {
  quoted "$@"
  if [[ -z "$dry_run" ]]; then
    "$@"
  fi
}
