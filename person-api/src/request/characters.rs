//! Characters of a line of text, by the properties that Unicode gives them.

use icu_properties::{
    CodePointMapData, CodePointSetData,
    props::{BidiControl, DefaultIgnorableCodePoint, GeneralCategory},
};

/// A control character, or what ends a line: a line separator, a paragraph separator.
pub(crate) fn is_control_or_line_break(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')
}

/// Changes the direction of the text around it, so that a reader sees another text than the stored one.
pub(crate) fn changes_direction(c: char) -> bool {
    CodePointSetData::new::<BidiControl>().contains(c)
}

/// Is visible by itself. White space does not, nor does what is made to be ignored where it is not supported:
/// joiners, variation selectors, tags, fillers. The braille pattern without dots is only named a symbol.
pub(crate) fn is_visible(c: char) -> bool {
    !(c.is_whitespace()
        || c == '\u{2800}'
        || CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(c)
        || matches!(
            CodePointMapData::<GeneralCategory>::new().get(c),
            GeneralCategory::Control | GeneralCategory::Format
        ))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    /// The characters of the first plane for which `rule` holds, as a pattern's class writes them.
    fn class(rule: impl Fn(char) -> bool) -> String {
        let mut class = String::new();
        let mut run: Option<(u32, u32)> = None;
        for code in 0..=0x1_0000 {
            let holds = code <= 0xffff && char::from_u32(code).is_some_and(&rule);
            run = match (run, holds) {
                (Some((first, _)), true) => Some((first, code)),
                (None, true) => Some((code, code)),
                (Some((first, last)), false) => {
                    write!(class, "\\u{first:04x}").unwrap();
                    if last > first {
                        write!(class, "-\\u{last:04x}").unwrap();
                    }
                    None
                }
                (None, false) => None,
            };
        }
        class
    }

    #[test]
    fn invisible_characters_are_known() {
        // Each is of another kind, or another block, of what is ignored by default.
        for c in "\u{ad}\u{34f}\u{61c}\u{115f}\u{1160}\u{17b4}\u{180b}\u{180e}\u{180f}\u{200b}\u{200d}\u{200f}\u{202e}\
                  \u{2060}\u{2064}\u{2065}\u{2066}\u{206f}\u{2800}\u{3164}\u{fe00}\u{fe0f}\u{feff}\u{ffa0}\u{fff0}\
                  \u{fffb}\u{1bca0}\u{1d173}\u{e0001}\u{e0041}\u{e007f}\u{e0100}\u{e01ef}\u{e0fff}\u{3000}\u{a0} "
            .chars()
        {
            assert!(!is_visible(c), "{c:?}");
        }
        for c in "a1.é字ا\u{20000}\u{1f600}\u{2801}\u{e1000}\u{e000}".chars() {
            assert!(is_visible(c), "{c:?}");
        }
    }

    #[test]
    fn characters_that_change_the_direction_are_known() {
        let turning: String = ('\0'..=char::MAX).filter(|c| changes_direction(*c)).collect();
        let known =
            "\u{61c}\u{200e}\u{200f}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}";
        assert_eq!(turning, known);
        assert_eq!(class(changes_direction), r"\u061c\u200e-\u200f\u202a-\u202e\u2066-\u2069");
    }

    /// Beyond the first plane the pattern takes every character for a visible one: patterns have no escape for those
    /// that every language reads alike.
    #[test]
    fn the_document_has_the_pattern_of_a_line() {
        let refused = class(|c| is_control_or_line_break(c) || changes_direction(c));
        let hidden = class(|c| !is_visible(c));
        let pattern = format!("'^[^{refused}]*[^{hidden}][^{refused}]*$'");
        assert!(crate::api::OPENAPI.contains(&pattern), "{pattern}");
    }
}
