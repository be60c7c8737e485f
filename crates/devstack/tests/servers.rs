//! The private servers: that they do what a test asks of them, and that nothing of them is left.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use devstack::{
    folder::{self, Folder},
    process::Launch,
    servers::{Servers, Setup},
    testing::{AMQP_URL, MANAGEMENT_URL, POSTGRES_URL},
};
use lapin::{
    BasicProperties, Connection, ConnectionProperties,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::FieldTable,
};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection as _, PgConnection};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const DEADLINE: Duration = Duration::from_mins(2);

/// Waits until `condition` holds; `what` is awaited says the panic when it never does.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < end, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A place of its own for what `devstack` leaves behind, so that nothing can hide.
struct Place {
    mark: String,
    folder: PathBuf,
}

impl Place {
    fn new() -> Self {
        let mark = Uuid::new_v4().simple().to_string();
        let folder = std::env::temp_dir().join(format!("place-{mark}"));
        fs::create_dir(&folder).unwrap();
        Self { mark, folder }
    }

    /// `devstack run` around a shell script, with the mark that all of its processes inherit.
    fn run(&self, script: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_devstack"));
        command.args(["run", "--", "sh", "-c", script]).kill_on_drop(true);
        // The servers around this test are not the ones that it is about.
        command.env_remove(POSTGRES_URL).env_remove(AMQP_URL).env_remove(MANAGEMENT_URL);
        command.env("TMPDIR", &self.folder).env("DEVSTACK_MARK", &self.mark).env("PLACE", &self.folder);
        command
    }

    /// Starts `devstack run` around a command that takes a child along and would never end; waits until
    /// both are there.
    async fn run_for_ever(&self, devstack: &mut Command) -> Child {
        let child = devstack.spawn().unwrap();
        until("the command runs", || self.folder.join("running").exists()).await;
        assert!(
            self.processes().len() > 8,
            "the servers, their helpers, the command: {:?}",
            self.processes()
        );
        child
    }

    /// What belongs to this place: by the mark that is inherited, or, for those who overwrite their
    /// environment, by the folder on their command line.
    fn processes(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
            let contains = |text: &[u8]| String::from_utf8_lossy(text).contains(&self.mark);
            if contains(&read("environ")) || contains(&read("cmdline")) {
                let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
                found.push(format!("{} {line:.60}", entry.file_name().display()));
            }
        }
        found
    }

    fn files(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// Waits until nothing is left.
    async fn empty(&self) {
        let _found = fs::remove_file(self.folder.join("running"));
        let end = tokio::time::Instant::now() + DEADLINE;
        while !(self.processes().is_empty() && self.files().is_empty()) {
            let left = (self.processes(), self.files());
            assert!(tokio::time::Instant::now() < end, "left behind: {left:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _left = fs::remove_dir_all(&self.folder);
    }
}

/// A command with a child of its own, and a file that tells that both run.
const FOR_EVER: &str = "sleep 100000 & echo > $PLACE/running; wait";

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[tokio::test]
async fn two_at_once_each_get_their_servers_and_leave_nothing() {
    let script = "psql --no-psqlrc -Atc 'SELECT 40 + 2' $DEVSTACK_POSTGRES_URL/postgres && exit 7";
    let (one, other) = (Place::new(), Place::new());
    let (one_ended, other_ended) =
        tokio::join!(async { one.run(script).output().await }, async { other.run(script).output().await });
    for (place, ended) in [(one, one_ended.unwrap()), (other, other_ended.unwrap())] {
        let errors = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(7), "the command's exit code; {errors}");
        assert_eq!(String::from_utf8_lossy(&ended.stdout), "42\n", "only the command's output; {errors}");
        // Not "in the end": the command has ended, so nothing is left by now.
        assert_eq!((place.processes(), place.files()), (vec![], vec![]));
    }
}

#[tokio::test]
async fn a_release_that_does_not_exist_is_refused_with_an_example() {
    for (setting, value, refused) in [
        (
            "DEVSTACK_POSTGRES",
            "9",
            "is \"9\", which is none of: 15, 16, 17, 18. Set for example DEVSTACK_POSTGRES=18",
        ),
        (
            "DEVSTACK_RABBITMQ",
            "4",
            "is \"4\", which is none of: 3.10, 4.0, 4.3. Set for example DEVSTACK_RABBITMQ=4.3",
        ),
    ] {
        let place = Place::new();
        let ended = place.run("echo started").env(setting, value).output().await.unwrap();
        assert!(!ended.status.success());
        assert_eq!(String::from_utf8_lossy(&ended.stdout), "");
        let errors = String::from_utf8_lossy(&ended.stderr);
        assert!(errors.contains(&format!("{setting} {refused}")), "{errors}");
        // What fetches them says the same.
        let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("servers");
        let ended = Command::new(install).env(setting, value).output().await.unwrap();
        assert!(!ended.status.success());
        let errors = String::from_utf8_lossy(&ended.stderr);
        assert!(errors.contains(&format!("{setting} {refused}")), "{errors}");
        place.empty().await;
    }
}

/// This machine's own system takes the part of another one.
#[tokio::test]
async fn a_program_of_another_system_is_one_process_with_its_own_usr() {
    let user = if rustix::process::geteuid().is_root() { "--mount" } else { "--user" };
    if !Command::new("unshare").args([user, "true"]).status().await.unwrap().success() {
        eprintln!("this user may not make namespaces: not tested");
        return;
    }
    let folder = Folder::temporary().unwrap();
    let launch = Launch::new(
        "sleep",
        Path::new("/usr/bin/sleep"),
        None,
        Signal::KILL,
        folder.mark(),
        folder.log("sleep").unwrap(),
    );
    let mut process = launch.inside(Some(Path::new("/"))).args(["1000"]).spawn().await.unwrap();
    let of = |pid: &str, file: &str| fs::read_link(format!("/proc/{pid}/{file}"));
    let pid = process.pid().to_string();
    until("sleep runs", || of(&pid, "exe").is_ok_and(|exe| exe.ends_with("sleep"))).await;
    assert_ne!(of(&pid, "ns/mnt").unwrap(), of("self", "ns/mnt").unwrap());
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert!(mounts.lines().any(|line| line.split(' ').nth(4) == Some("/usr")), "{mounts}");
    assert!(process.stop(Signal::TERM, DEADLINE, &CancellationToken::new()).await, "the signal reached it");
}

#[tokio::test]
async fn nothing_is_left_after_an_interrupt() {
    let place = Place::new();
    let mut devstack = place.run_for_ever(&mut place.run(FOR_EVER)).await;
    signal(&devstack, Signal::INT);
    let status = devstack.wait().await.unwrap();
    assert_eq!(status.code(), Some(143), "the command was ended by SIGTERM");
    place.empty().await;
}

#[tokio::test]
async fn nothing_is_left_after_sigkill() {
    let place = Place::new();
    let mut devstack = place.run_for_ever(&mut place.run(FOR_EVER)).await;
    devstack.kill().await.unwrap();
    place.empty().await;
}

#[tokio::test]
async fn nothing_is_left_when_the_parent_is_gone() {
    let place = Place::new();
    let inner = place.run(FOR_EVER);
    let mut parent = Command::new("sh");
    // Not the script's last command, which the shell would become.
    parent
        .args(["-c", "\"$@\"; true", "parent"])
        .arg(inner.as_std().get_program())
        .args(inner.as_std().get_args());
    for (name, value) in inner.as_std().get_envs() {
        match value {
            Some(value) => parent.env(name, value),
            None => parent.env_remove(name),
        };
    }
    let mut parent = place.run_for_ever(&mut parent).await;
    parent.kill().await.unwrap();
    place.empty().await;
}

#[tokio::test]
async fn one_stack_at_a_time_uses_a_folder() {
    let place = Place::new();
    let path = place.folder.join("data");
    let first = Folder::kept(&path).unwrap();
    let error = Folder::kept(&path).unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    assert_eq!(folder::running(&path), Some(std::process::id().to_string()));

    drop(first);
    assert_eq!(folder::running(&path), None);
    assert!(!path.join("lock").exists(), "no lock is left behind");

    // What a killed process leaves.
    fs::write(path.join("lock"), "1").unwrap();
    assert_eq!(folder::running(&path), None);
    drop(Folder::kept(&path).unwrap());
}

#[tokio::test]
async fn servers_keep_their_data_through_stop_kill_and_pause() {
    let folder = Folder::temporary().unwrap();
    let path = folder.path().to_owned();
    let no_hurry = CancellationToken::new();
    let mut servers = Servers::start(&folder, Setup::QUIET).await.unwrap();
    private_to_their_owner(&path);
    servers_write(&servers, 1).await;

    assert!(servers.rabbitmq.stop(&no_hurry).await, "in good order");
    assert!(servers.postgres.stop(&no_hurry).await, "in good order");
    servers.postgres.start().await.unwrap();
    servers.rabbitmq.start().await.unwrap();
    servers_write(&servers, 2).await;

    servers.postgres.kill().await;
    servers.rabbitmq.kill().await;
    servers.postgres.start().await.unwrap();
    servers.rabbitmq.start().await.unwrap();
    servers_write(&servers, 3).await;

    servers.postgres.pause();
    servers.rabbitmq.pause();
    let short = Duration::from_millis(300);
    let postgres = servers.postgres.url();
    let rabbitmq = servers.rabbitmq.url();
    let connecting = PgConnection::connect(&postgres);
    tokio::time::timeout(short, connecting).await.expect_err("a paused PostgreSQL says nothing");
    let connecting = Connection::connect(&rabbitmq, ConnectionProperties::default());
    tokio::time::timeout(short, connecting).await.map(drop).expect_err("a paused RabbitMQ says nothing");
    servers.postgres.resume();
    servers.rabbitmq.resume();
    servers_write(&servers, 4).await;

    drop((servers, folder));
    assert!(!path.exists(), "the temporary folder went with its stack");
}

/// Adds a row and a message, and finds those of before: `count` in all.
async fn servers_write(servers: &Servers, count: i64) {
    let mut conn = PgConnection::connect(&format!("{}/postgres", servers.postgres.url())).await.unwrap();
    sqlx::query("CREATE TABLE IF NOT EXISTS kept (i bigint)").execute(&mut conn).await.unwrap();
    sqlx::query("INSERT INTO kept SELECT count(*) FROM kept").execute(&mut conn).await.unwrap();
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM kept").fetch_one(&mut conn).await.unwrap();
    assert_eq!(rows, count);

    let conn = Connection::connect(&servers.rabbitmq.url(), ConnectionProperties::default()).await.unwrap();
    let channel = conn.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare("kept".into(), durable, FieldTable::default()).await.unwrap();
    let (options, persistent) =
        (BasicPublishOptions::default(), BasicProperties::default().with_delivery_mode(2));
    channel
        .basic_publish("".into(), "kept".into(), options, b"kept", persistent)
        .await
        .unwrap()
        .await
        .unwrap();
    let got = channel.basic_get("kept".into(), BasicGetOptions::default()).await.unwrap().unwrap();
    assert_eq!(i64::from(got.message_count) + 1, count);
    conn.close(200, "done".into()).await.unwrap();
}

/// Nobody but the owner reads a secret, and no secret is on a command line.
fn private_to_their_owner(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let secrets = fs::read_to_string(folder.join("secrets.json")).unwrap();
    let secrets: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&secrets).unwrap();
    for file in ["secrets.json", "rabbitmq/rabbitmq.conf", "rabbitmq/.erlang.cookie"] {
        let mode = fs::metadata(folder.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file} has mode {mode:o}");
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        for (name, secret) in &secrets {
            assert!(!line.contains(secret.as_str().unwrap()), "{name} is on a command line: {line}");
        }
    }
}
