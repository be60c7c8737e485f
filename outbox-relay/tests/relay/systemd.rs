//! What the service manager hears, and the unit that it is given.

use std::{path::Path, time::Duration};

use tokio::{net::UnixDatagram, process::Command};

use crate::stack::{Relay, Stack};

/// Receives until something contains `word`.
async fn hears(socket: &UnixDatagram, word: &str) -> String {
    let heard = async {
        let mut buffer = vec![0; 4096];
        loop {
            let length = socket.recv(&mut buffer).await.unwrap();
            let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if said.contains(word) {
                return said;
            }
        }
    };
    let heard = tokio::time::timeout(Duration::from_mins(1), heard).await;
    heard.unwrap_or_else(|_| panic!("the service manager was never told: {word}"))
}

#[tokio::test]
async fn the_service_manager_is_told() {
    // The broker has no exchange yet, so that there is something to wait for.
    let stack = Stack::without_exchange("relay_systemd").await;
    let path = std::env::temp_dir().join(format!("{}.sock", uuid::Uuid::new_v4().simple()));
    let socket = UnixDatagram::bind(&path).unwrap();
    let mut program = stack.command("run");
    let mut relay = Relay::start(program.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "1000000")).await;
    let said = hears(&socket, "does not exist").await;
    assert!(said.starts_with("STATUS=waiting: broker: "), "{said}");
    hears(&socket, "WATCHDOG=1").await;
    stack.declare_exchange(lapin::ExchangeKind::Topic).await;
    hears(&socket, "READY=1").await;
    hears(&socket, "STATUS=at work").await;
    relay.terminate().await;
    hears(&socket, "STOPPING=1").await;
    std::fs::remove_file(&path).unwrap();
}

/// Where systemd is, it says whether the unit is one, and how much it leaves open.
#[tokio::test]
async fn the_unit_is_sound_and_hardened() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd/outbox-relay@.service");
    let text = std::fs::read_to_string(unit).unwrap();
    // What it sets is what the program knows.
    let help = crate::stack::output(crate::stack::program().args(["run", "--help"])).await;
    for line in text.lines().filter(|line| line.starts_with("Environment=")) {
        for setting in line.trim_start_matches("Environment=").split_whitespace() {
            let name = setting.split('=').next().unwrap();
            assert!(help.contains(&format!("[env: {name}=]")), "outbox-relay run knows no {name}");
        }
    }
    // The program is where this build has it, not where an installation would.
    let folder = std::env::temp_dir().join(uuid::Uuid::new_v4().simple().to_string());
    std::fs::create_dir(&folder).unwrap();
    let copy = folder.join("outbox-relay@person.service");
    std::fs::write(
        &copy,
        text.replace("ExecStart=outbox-relay", concat!("ExecStart=", env!("CARGO_BIN_EXE_outbox-relay"))),
    )
    .unwrap();
    let analyze = async |arguments: &[&str]| {
        let mut program = Command::new("systemd-analyze");
        match program.args(arguments).arg(&copy).output().await {
            Ok(output) => Some(output),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("systemd-analyze is not on this machine: the unit was not verified");
                None
            }
            Err(error) => panic!("{error}"),
        }
    };
    if let Some(verified) = analyze(&["verify", "--recursive-errors=no", "--man=no"]).await {
        // It may say other things about the machine's own units.
        let said = String::from_utf8_lossy(&verified.stderr);
        assert!(verified.status.success() && !said.contains("outbox-relay@"), "{said}");
    }
    // 10 is the worst; 2.0 is what `--threshold=20` lets pass.
    if let Some(secure) = analyze(&["security", "--offline=true", "--threshold=20"]).await {
        let said = String::from_utf8_lossy(&secure.stdout);
        assert!(secure.status.success(), "{said}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
