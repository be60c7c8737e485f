//! Files of secrets that others on the machine can read: the program says so, at the start and when one is read again.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use crate::support::{Database, Program, until};

const KEYS: &str = "shop:0123456789abcdef\n";
const WARNING: &str = "a file of secrets can be read by others on this machine";

fn file(name: &str, text: &str, mode: u32) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_file(&path);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    path
}

/// How often the log warns of the file.
fn warnings(log: &str, path: &Path, mode: &str) -> usize {
    let named = |line: &&str| {
        line.contains(WARNING)
            && line.contains(&format!("\"path\":\"{}\"", path.display()))
            && line.contains(&format!("\"mode\":\"{mode}\""))
    };
    log.lines().filter(named).count()
}

#[tokio::test]
async fn a_file_that_others_can_read_is_named_at_the_start_and_again() {
    let database = Database::new().await;
    for (mode, shown, count) in
        [(0o600, "0600", 0), (0o644, "0644", 1), (0o640, "0640", 1), (0o604, "0604", 1)]
    {
        let keys = file(&format!("open-keys-{shown}"), KEYS, mode);
        let url = file(&format!("open-url-{shown}"), &database.url(None), mode);
        let program =
            Program::start_at(url.to_str().unwrap(), &["--api-keys-file", keys.to_str().unwrap()]).await;
        if mode == 0o600 {
            // It is looked at again when the file is read again.
            fs::set_permissions(&keys, fs::Permissions::from_mode(0o644)).unwrap();
            until("the keys are read again", async || program.logged().contains("the keys were read again"))
                .await;
        }
        program.terminate();
        let (_, log) = program.ended().await;
        assert_eq!(warnings(&log, &keys, shown), count, "{log}");
        assert_eq!(warnings(&log, &url, shown), count, "{log}");
        assert_eq!(warnings(&log, &keys, "0644"), usize::from(mode == 0o600 || mode == 0o644), "{log}");
        assert!(!log.contains("0123456789abcdef"), "a secret is written down");
    }
}
