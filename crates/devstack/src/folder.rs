//! Where a stack keeps its data: a folder of the checkout, or a temporary one that goes with it.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{log::Log, reaper::Reaper};

/// Others may pass the folder, as PostgreSQL must that runs as another user, and read nothing in it.
const OPEN: u32 = 0o711;

/// A stack's folder. Only one stack at a time uses it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    secrets: Secrets,
    // In this order: the reaper ends what is left before the lock is released.
    reaper: Reaper,
    lock: Option<Lock>,
}

impl Folder {
    /// A folder that is kept. Fails when a stack runs in it.
    pub fn kept(path: &Path) -> anyhow::Result<Self> {
        create(path, OPEN)?;
        let path = path.canonicalize()?;
        let lock = Lock::take(&path.join("lock"))?;
        Ok(Self { secrets: Secrets::of(&path)?, reaper: Reaper::start(None)?, path, lock: Some(lock) })
    }

    /// A folder that is removed together with this value, also when this process is killed.
    pub fn temporary() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("devstack-{}", Uuid::new_v4().simple()));
        let reaper = Reaper::start(Some(&path))?;
        create(&path, OPEN)?;
        Ok(Self { secrets: Secrets::of(&path)?, reaper, path, lock: None })
    }

    /// Where it is, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is removed together with this value.
    pub fn is_temporary(&self) -> bool {
        self.lock.is_none()
    }

    /// The passwords of its servers.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// What every process of the stack carries in the variable that names its stack.
    pub fn mark(&self) -> &str {
        self.reaper.mark()
    }

    /// The folder for what the part `name` stores, made if it is not there.
    pub fn part(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path.join(name);
        create(&path, 0o700)?;
        Ok(path)
    }

    /// Where the part `name` writes its log. Begins anew with every stack.
    pub fn log(&self, name: &str) -> anyhow::Result<Log> {
        let path = self.part("log")?.join(format!("{name}.log"));
        File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Log::new(path, !self.is_temporary()))
    }
}

/// The process that runs a stack in the folder `path`, if there is one.
pub fn running(path: &Path) -> Option<String> {
    let mut file = File::open(path.join("lock")).ok()?;
    match file.try_lock_shared() {
        Ok(()) => None,
        Err(_) => Some(pid_in(&mut file)),
    }
}

/// Makes a folder, unless it is there.
fn create(path: &Path, mode: u32) -> anyhow::Result<()> {
    let created = DirBuilder::new().recursive(true).mode(mode).create(path);
    created.with_context(|| format!("cannot make the folder {}", path.display()))
}

/// Writes a file that only its owner may read.
pub fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The passwords of a stack's servers, made once and kept in its folder.
#[derive(Debug, Serialize, Deserialize)]
pub struct Secrets {
    /// Of PostgreSQL's superuser and of the programs' roles.
    pub postgres: String,
    /// Of RabbitMQ's administrator.
    pub rabbitmq: String,
    /// Erlang's: whoever knows it may run code in the node.
    pub cookie: String,
}

impl Secrets {
    fn of(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("secrets.json");
        if let Ok(text) = fs::read_to_string(&path) {
            return serde_json::from_str(&text)
                .with_context(|| format!("{} is damaged; remove {}", path.display(), folder.display()));
        }
        let random = || Uuid::new_v4().simple().to_string();
        let secrets = Self { postgres: random(), rabbitmq: random(), cookie: random() };
        write_private(&path, &serde_json::to_string_pretty(&secrets)?)?;
        Ok(secrets)
    }
}

/// A locked file with the process's number in it. The kernel unlocks it when the process ends, however
/// it ends, so a file that was left behind locks nobody out.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(path: &Path) -> anyhow::Result<Self> {
        loop {
            let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => bail!(
                    "a stack runs here already: process {} (its data is in {}); end it first",
                    pid_in(&mut file),
                    path.parent().unwrap_or(path).display()
                ),
                Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the data folder"),
            }
            // Its last owner may have removed it between our opening and our locking it.
            if fs::metadata(path).is_ok_and(|found| file.metadata().is_ok_and(|own| own.ino() == found.ino()))
            {
                file.set_len(0)?;
                write!(file, "{}", std::process::id())?;
                return Ok(Self { path: path.to_owned(), _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.path);
    }
}

fn pid_in(file: &mut File) -> String {
    let mut pid = String::new();
    let _unknown = file.read_to_string(&mut pid);
    pid
}
