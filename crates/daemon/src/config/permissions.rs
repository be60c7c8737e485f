//! Whether a file of secrets is one: others on the machine must not be able to read it.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// Says so where others can read a file that holds secrets, as ssh does: where everybody can, and where the group of a
/// file can that is ours, since we need no group to read it. A program goes on with it: the file may be the work of a
/// system that hands out secrets, on a machine of its own.
pub fn warn_if_others_read(setting: &str, path: &Path) {
    let Ok(file) = fs::metadata(path) else { return };
    let ours = file.uid() == rustix::process::geteuid().as_raw();
    if !is_open(file.mode(), ours) {
        return;
    }
    let (mode, path) = (format!("{:04o}", file.mode() & 0o7777), path.display().to_string());
    let advice = format!("chmod 600 {}", escape::shell_word(&path));
    // Some commands have no log.
    if tracing::dispatcher::has_been_set() {
        tracing::warn!(
            setting,
            path,
            mode,
            advice,
            "a file of secrets can be read by others on this machine"
        );
    } else {
        eprintln!(
            "warning: {setting}: the file {} has mode {mode}: others on this machine can read its secrets; {advice}",
            escape::line(&path)
        );
    }
}

fn is_open(mode: u32, ours: bool) -> bool {
    mode & 0o007 != 0 || ours && mode & 0o070 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_open_where_others_than_we_can_use_it() {
        for (mode, ours, open) in [
            (0o100_600, true, false),
            (0o100_400, true, false),
            (0o100_644, true, true),
            (0o100_640, true, true),
            (0o100_604, true, true),
            // A file of root's that our group may read, as systems hand out secrets.
            (0o100_640, false, false),
            (0o100_444, false, true),
        ] {
            assert_eq!(is_open(mode, ours), open, "{mode:o} {ours}");
        }
    }
}
