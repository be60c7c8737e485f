//! What the examples in other languages need, installed once for each state of their lists of packages.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use tokio::{process::Command, sync::OnceCell};

/// The folder of the examples.
pub(crate) fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples").join(path)
}

/// Where a folder of examples is copied and installed: alone, as by a reader.
fn home(language: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("examples").join(language)
}

/// Copies a folder of examples, and installs what its file `list` names, unless that is there. Other processes wait.
async fn install(language: &str, list: &str, install: impl AsyncFnOnce(&Path)) -> PathBuf {
    let home = home(language);
    fs::create_dir_all(&home).unwrap();
    let lock = File::create(home.with_extension("lock")).unwrap();
    tokio::task::spawn_blocking({
        let lock = lock.try_clone().unwrap();
        move || lock.lock().unwrap()
    })
    .await
    .unwrap();
    for entry in fs::read_dir(source(language)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), home.join(entry.file_name())).unwrap();
        }
    }
    let (wanted, mark) = (fs::read(home.join(list)).unwrap(), home.join("installed"));
    if fs::read(&mark).ok() != Some(wanted.clone()) {
        install(&home).await;
        fs::write(&mark, wanted).unwrap();
    }
    home
}

async fn done(command: &mut Command, what: &str) {
    let output = command.kill_on_drop(true).output().await;
    let output = output.unwrap_or_else(|error| panic!("{what}: {error}; run crates/devstack/install tests"));
    assert!(
        output.status.success(),
        "{what} failed. It needs the registry of the packages, and what crates/devstack/install tests installs.\n{}",
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
    );
}

/// The folder of the examples in Python, with a virtual environment in it.
pub(crate) async fn python() -> &'static Path {
    static HOME: OnceCell<PathBuf> = OnceCell::const_new();
    HOME.get_or_init(|| {
        install("python", "requirements.txt", async |home| {
            let venv = home.join("venv");
            let _ = fs::remove_dir_all(&venv);
            let python = has_venv().await;
            done(Command::new(python).args(["-m", "venv"]).arg(&venv), "python3 -m venv").await;
            let mut pip = Command::new(venv.join("bin/pip"));
            pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--requirement"]);
            done(pip.arg(home.join("requirements.txt")), "pip install").await;
        })
    })
    .await
}

/// A Python that can make virtual environments.
async fn has_venv() -> &'static str {
    for python in ["python3", "/usr/bin/python3"] {
        let asked = Command::new(python).args(["-c", "import ensurepip, venv"]).output().await;
        if asked.is_ok_and(|asked| asked.status.success()) {
            return python;
        }
    }
    panic!("no python3 can make a virtual environment: run crates/devstack/install tests")
}

/// The folder of the examples in JavaScript, with their packages in it.
pub(crate) async fn node() -> &'static Path {
    static HOME: OnceCell<PathBuf> = OnceCell::const_new();
    HOME.get_or_init(|| {
        install("node", "package-lock.json", async |home| {
            let mut npm = Command::new("npm");
            npm.args(["ci", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(home);
            done(&mut npm, "npm ci").await;
        })
    })
    .await
}
