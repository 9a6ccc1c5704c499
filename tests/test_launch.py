"""Tests the commands of each launch script, and that shellcheck reports no problems."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / 'launch').glob('*.sh') if path.stem != 'common')
GPU_MINUTES = sorted(
    path for path in (ROOT / 'launch/gpu_minutes').glob('*.sh') if path.stem != 'common'
)
WORKDIR = '/mnt/a shared disk'


def run(name, *arguments, code=0, config='configs/gemma4_26b_a4b.py', first=(), **environment):
    script = str(ROOT / 'launch' / f'{name}.sh')
    done = subprocess.run(
        [script, *arguments, *first, config, WORKDIR, '--config.seed=3'],
        cwd=ROOT,
        env={'PATH': '/usr/bin:/bin', 'HOME': '/root'} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def innermost(line):
    """Returns the words of a command, with nested shell commands (--command, --wrap) expanded."""
    words = shlex.split(line)
    for word in words:
        option, _, value = word.partition('=')
        if option in ('--command', '--wrap'):
            return words + shlex.split(value)
    return words


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_dry_run_prints_the_entry_point_with_its_flags(name):
    first = ('2',) if name == 'local_multiprocess' else ()
    lines = run(name, '--dry_run', first=first).stdout.splitlines()
    for line in lines[-2:] if first else lines[-1:]:
        words = innermost(line)
        start = words.index('diffusiongemma.distill')
        assert words[start - 1] == '-m'
        assert words[start + 1 : start + 3] == [
            '--config=configs/gemma4_26b_a4b.py',
            f'--workdir={WORKDIR}',
        ]
        assert '--config.seed=3' in words
        if name not in ('single_node', 'local_multiprocess'):
            assert '--distributed' in words
    if first:
        assert [shlex.split(line)[-1] for line in lines] == ['--process_id=0', '--process_id=1']


@pytest.mark.parametrize('name', ['tpu_vm', 'gke_xpk'])
def test_a_slice_is_created_only_when_asked_for(name):
    assert 'create diffusiongemma ' not in run(name, '--dry_run').stdout.replace('workload', '')
    out = run(name, '--dry_run', CREATE='yes', PROJECT='mine').stdout
    assert 'v5p-128' in out and '--project=mine' in out
    assert len(out.splitlines()) == len(run(name, '--dry_run').stdout.splitlines()) + 1


@pytest.mark.parametrize('name', ['tpu_vm', 'gke_xpk'])
def test_flags_of_the_tpu_compiler_reach_every_host(name):
    line = run(name, '--dry_run', LIBTPU_INIT_ARGS='--one=true --two=3').stdout.splitlines()[-1]
    words = innermost(line)
    start = words.index('env')
    assert words[start + 1] == 'LIBTPU_INIT_ARGS=--one=true --two=3'
    assert words[start + 3 : start + 5] == ['-m', 'diffusiongemma.distill']
    assert 'LIBTPU_INIT_ARGS' not in run(name, '--dry_run').stdout


COMPILE = """
import jax
from diffusiongemma.planning.compiler import topology_devices
(device, *_), _ = topology_devices('v5p:2x2x1')
x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x + 1).lower(x).compile()
"""


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install -e '.[plan]'"
)
def test_the_installed_compiler_knows_the_flags_of_the_launch_page():
    page = (ROOT / 'docs' / 'launch.md').read_text(encoding='utf-8')
    flags = page.partition("export LIBTPU_INIT_ARGS='")[2].partition("'")[0]
    assert len(flags.split()) == 5

    def compiled(flags):
        environment = os.environ | {'XLA_FLAGS': '', 'LIBTPU_INIT_ARGS': flags}
        command = [sys.executable, '-c', COMPILE]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = compiled(flags)
    assert done.returncode == 0, done.stderr
    assert 'Unknown command line flag' in compiled('--xla_tpu_no_such_flag=true').stderr


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_config_that_is_not_there_is_named(name):
    first = ('2',) if name == 'local_multiprocess' else ()
    done = run(name, '--dry_run', first=first, config='configs/none.py', code=1)
    assert done.stderr == 'error: no config file configs/none.py\n'


def test_what_is_copied_to_workers_is_the_project_alone(tmp_path):
    root = tmp_path / 'a project'
    shutil.copytree(ROOT / 'launch', root / 'launch')
    for name in ('own_config.py', '.gitignore', 'env/pyvenv.cfg', 'env/lib/x.py', 'build/y.py'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('build/\n' if name == '.gitignore' else '')
    script = 'source "$1/launch/common.sh"; stage; cd "$staged"; find . -type f | sort; pwd'
    files_there = [path for path in (ROOT / 'launch').rglob('*') if path.is_file()]
    expected = sorted(f'./{path.relative_to(ROOT)}' for path in files_there)
    for is_checkout in (False, True):
        if is_checkout:
            subprocess.run(['git', 'init', '-q', root], check=True)
        command = ['bash', '-c', 'set -euo pipefail; ' + script, 'bash', str(root)]
        environment = {'PATH': '/usr/bin:/bin', 'TMPDIR': str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        *files, staged = done.stdout.splitlines()
        extra = [] if is_checkout else ['./build/y.py']
        assert files == sorted(['./.gitignore', './own_config.py', *extra, *expected])
        assert staged != str(root) and staged.endswith('/diffusiongemma')


def test_old_python_on_the_workers_is_named_before_anything_is_installed():
    line = run('tpu_vm', '--dry_run', PYTHON='python3.12').stdout.splitlines()[-1]
    (command,) = [w for w in shlex.split(line) if w.startswith('--command=')]
    check = command.removeprefix('--command=').partition(' && cd ')[0]
    for python, code in ((sys.executable, 0), ('false', 1)):
        done = subprocess.run(
            ['bash', '-c', check.replace('python3.12', python, 1)], capture_output=True, text=True
        )
        assert done.returncode == code
        assert ('error: the workers need Python 3.11 or newer' in done.stderr) == bool(code)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}') or shutil.which(
        'shellcheck'
    )
    if shellcheck is None:
        pytest.skip("no shellcheck; pip install -e '.[test]' brings it")
    for folder in (ROOT / 'launch', ROOT / 'launch' / 'gpu_minutes'):
        scripts = sorted(map(str, folder.glob('*.sh')))
        done = subprocess.run(
            [shellcheck, '-x', *scripts], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('path', GPU_MINUTES, ids=lambda path: path.stem)
def test_the_scripts_for_gpu_minutes_print_commands_whose_flags_exist(path, tmp_path):
    done = subprocess.run(
        [str(path), '--dry_run', str(tmp_path / 'out')], capture_output=True, text=True, check=True
    )
    assert not (tmp_path / 'out').exists()
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        program = words[1] if words[1] != '-m' else words[2].replace('.', '/') + '.py'
        text = (ROOT / program).read_text(encoding='utf-8')
        for option in words[3 if words[1] == '-m' else 2 :]:
            name, _, value = option.removeprefix('--').partition('=')
            if name == 'config':
                config = value
                assert (ROOT / value).exists()
            elif name.startswith('config.'):
                key = name.rpartition('.')[2]
                assert f"'{key}'" in (ROOT / config).read_text(encoding='utf-8')
            else:
                assert f"'{name}'" in text


def test_a_script_for_gpu_minutes_says_how_it_is_called():
    done = subprocess.run([str(GPU_MINUTES[0])], capture_output=True, text=True)
    assert done.returncode == 2 and '[--dry_run] OUTPUT' in done.stderr
