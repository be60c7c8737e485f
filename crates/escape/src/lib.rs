//! Escapes texts that others wrote, for terminals, logs, JSON and shells.
//!
//! An aggregate's id, a type, a routing key or an error may be any text that a publisher sends or a writer stores.
//! Printed as it is, a line break in it forges a line of the log, an escape sequence controls the terminal, and a
//! direction mark reorders the text around it; in a suggested command it would run. [`line()`] is for people,
//! [`shell_word`] for a shell.

use std::{
    borrow::Cow,
    fmt::{self, Display, Write},
};

/// A text in one line: control characters, line breaks, direction marks and other invisible characters appear as escapes
/// (`\n`, `\u{1b}`, `\u{202e}`).
pub fn line(text: &str) -> Line<'_> {
    Line(text)
}

/// See [`line()`].
#[derive(Clone, Copy, Debug)]
pub struct Line<'a>(&'a str);

impl Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| if is_invisible(c) { escape(f, c) } else { f.write_char(c) })
    }
}

/// As [`line()`], for a text of several lines: its line breaks stay.
pub fn lines(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| is_invisible(c) && c != '\n') {
        return text.into();
    }
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_invisible(c) && c != '\n' {
            // Writing to a string cannot fail.
            let _ = escape(&mut safe, c);
        } else {
            safe.push(c);
        }
    }
    safe.into()
}

/// As [`lines`], for a JSON document, whose value stays the same: such characters can only stand in its strings, and get
/// JSON's own escapes.
pub fn json(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| is_invisible(c) && c != '\n') {
        return text.into();
    }
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_invisible(c) && c != '\n' {
            for unit in c.encode_utf16(&mut [0; 2]).iter() {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(c);
        }
    }
    safe.into()
}

/// A text as one word of a shell's command: bare where that is safe, between single quotes, or as `$'…'` (bash, zsh, ksh,
/// POSIX since 2024) if it has invisible characters.
pub fn shell_word(text: &str) -> Cow<'_, str> {
    let bare = |c: char| c.is_ascii_alphanumeric() || "-_./:,@%+=".contains(c);
    // An equals sign at the beginning is expanded by zsh.
    if !text.is_empty() && text.chars().all(bare) && !text.starts_with('=') {
        return text.into();
    }
    if !text.chars().any(is_invisible) {
        return format!("'{}'", text.replace('\'', r"'\''")).into();
    }
    let mut word = String::from("$'");
    for c in text.chars() {
        match c {
            '\n' => word.push_str("\\n"),
            '\'' | '\\' => word.extend(['\\', c]),
            // Byte by byte, since not every shell knows the others. Three octal digits end by themselves.
            c if is_invisible(c) => {
                for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                    let _ = write!(word, "\\{byte:03o}");
                }
            }
            c => word.push(c),
        }
    }
    word.push('\'');
    word.into()
}

/// `\n`, `\r`, `\t`, `\u{…}`.
fn escape(to: &mut impl Write, c: char) -> fmt::Result {
    match c {
        '\n' => to.write_str("\\n"),
        '\r' => to.write_str("\\r"),
        '\t' => to.write_str("\\t"),
        c => write!(to, "\\u{{{:x}}}", u32::from(c)),
    }
}

/// A control character, what ends a line, or what shows nothing by itself or changes what is around it.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{34f}'
                | '\u{61c}'
                | '\u{115f}'..='\u{1160}'
                | '\u{17b4}'..='\u{17b5}'
                | '\u{180b}'..='\u{180f}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{3164}'
                | '\u{fe00}'..='\u{fe0f}'
                | '\u{feff}'
                | '\u{ffa0}'
                | '\u{fff0}'..='\u{fffb}'
                | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const HOSTILE: [&str; 12] = [
        "o-1",
        "",
        "a b",
        "a\nrelay default: all is well",
        "\u{1b}[2J\u{1b}]0;title\u{7}",
        "$(touch /tmp/x)",
        "`id`; rm -rf ~ & 'quoted' \"too\" \\ # ! *",
        "\u{202e}dlo\u{2066}",
        "=ls",
        "-rf",
        "\u{9b}31m\u{7f}\r\t'\\",
        "é 漢字 \u{e0041}",
    ];

    #[test]
    fn invisible_characters_are_escaped_and_the_text_stays_in_its_line() {
        for text in HOSTILE {
            let shown = line(text).to_string();
            assert!(!shown.chars().any(is_invisible), "{shown:?}");
        }
        assert_eq!(line("a\nb\u{1b}[0m\u{202e}é").to_string(), r"a\nb\u{1b}[0m\u{202e}é");
        assert_eq!(lines("a\nb\u{1b}[0m"), "a\nb\\u{1b}[0m");
        assert_eq!(json("{\n \"a\": \"\u{9b}\u{e0041}\"}"), "{\n \"a\": \"\\u009b\\udb40\\udc41\"}");
    }

    /// The shell is asked itself.
    #[test]
    fn a_shell_takes_a_quoted_text_for_that_text() {
        for text in HOSTILE {
            let word = shell_word(text);
            assert!(!word.chars().any(is_invisible), "{word:?}");
            let script = format!("printf '<%s>' {word}");
            let output = Command::new("bash").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("<{text}>"), "{word}");
        }
        assert_eq!(shell_word("order/o-1"), "order/o-1");
        assert_eq!(shell_word("order/it's"), r"'order/it'\''s'");
    }
}
