//! Asks before something that cannot be taken back.

use std::{
    io::{self, BufRead, IsTerminal, Write, stderr, stdin},
    thread,
};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Whether somebody is there to answer: both the question and the answer are at a terminal.
pub(super) fn can_ask() -> bool {
    stdin().is_terminal() && stderr().is_terminal()
}

/// Asks, and returns whether the answer is yes. No answer before `stop` is a no.
pub(super) async fn confirmed(question: &str, stop: &CancellationToken) -> io::Result<bool> {
    let mut terminal = stderr().lock();
    write!(terminal, "{} [y/N] ", escape::lines(question))?;
    terminal.flush()?;
    drop(terminal);
    let (answer, answered) = oneshot::channel();
    // A thread of its own, which the end of the process does not wait for.
    thread::spawn(move || {
        let mut line = String::new();
        let read = stdin().lock().read_line(&mut line).map(|_| line);
        let _nobody_waits = answer.send(read);
    });
    match stop.run_until_cancelled(answered).await {
        Some(Ok(line)) => Ok(is_yes(&line?)),
        _ => Ok(false),
    }
}

fn is_yes(line: &str) -> bool {
    ["y", "yes"].contains(&line.trim().to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_yes_is_a_yes() {
        for (line, yes) in
            [("y\n", true), (" Yes \r\n", true), ("", false), ("\n", false), ("n\n", false), ("yy\n", false)]
        {
            assert_eq!(is_yes(line), yes, "{line:?}");
        }
    }
}
