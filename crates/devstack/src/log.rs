//! What a process writes, and its end for a message.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// A log's file.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    /// Whether the file is there after the stack has ended. A message names no other.
    stays: bool,
}

impl Log {
    /// The log at `path`. `stays`: the file is there after the stack has ended.
    pub(crate) fn new(path: PathBuf, stays: bool) -> Self {
        Self { path, stays }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The log of a tool that works on the same part.
    #[must_use]
    pub fn beside(&self, tool: &str) -> Self {
        Self { path: self.path.with_extension(format!("{tool}.log")), ..*self }
    }

    /// The end of what was written from the byte `begin` on, for a message: more of it if the file goes away.
    pub fn last_words(&self, begin: u64) -> String {
        let text = tail(&self.path, begin).unwrap_or_default();
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        if lines.is_empty() {
            return " without a word".to_owned();
        }
        let shown = if self.stays { 8 } else { 40 };
        let last = lines[lines.len().saturating_sub(shown)..].join("\n    ");
        let rest = if self.stays { format!("\n  all of it: {}", self.path.display()) } else { String::new() };
        format!("\n    {last}{rest}")
    }
}

/// The last 8 KiB of a file, but nothing from before `begin`.
fn tail(path: &Path, begin: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(begin.max(end.saturating_sub(8192)).min(end)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_message_names_a_log_only_if_it_stays() {
        let path = std::env::temp_dir().join(format!("devstack-log-{}", Uuid::new_v4().simple()));
        let lines: Vec<String> = (1..=60).map(|n| format!("line {n}")).collect();
        fs::write(&path, lines.join("\n")).unwrap();
        let words = |stays| Log { path: path.clone(), stays }.last_words(0);
        let name = path.display().to_string();
        assert!(words(true).contains(&name) && !words(true).contains("line 52\n"));
        assert!(
            !words(false).contains(&name)
                && words(false).contains("line 21\n")
                && words(false).ends_with("line 60")
        );
        assert_eq!(Log { path: path.clone(), stays: false }.last_words(u64::MAX), " without a word");
        fs::remove_file(&path).unwrap();
    }
}
