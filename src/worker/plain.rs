//! Words of a worker as they may be shown: in a reason, in the log and on a terminal, which would obey some characters.

use std::borrow::Cow;
use std::ops::RangeInclusive;

const ESCAPE: char = '\u{1b}';
const BELL: char = '\u{7}';
/// The escape character and `[` in one.
const CONTROL_SEQUENCE: char = '\u{9b}';

/// Without what a terminal would obey: sequences such as colours are left out, a run of other control characters is a space.
/// Ends of lines and tabs stay.
pub(super) fn plain(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_run = false;
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        let sequence = match c {
            ESCAPE => escape_length(after),
            CONTROL_SEQUENCE => parameters_length(after),
            _ => None,
        };
        rest = &after[sequence.unwrap_or(0)..];
        if sequence.is_some() {
            continue;
        }
        if !is_obeyed(c) {
            out.push(c);
        } else if !in_run {
            out.push(' ');
        }
        in_run = is_obeyed(c);
    }
    Cow::Owned(out)
}

/// Leaves out the middle of what is longer than `limit_bytes`, most of it before the end: a long line ends with its point.
pub(super) fn without_middle(text: &str, limit_bytes: usize) -> Cow<'_, str> {
    if text.len() <= limit_bytes {
        return Cow::Borrowed(text);
    }
    let head = text.floor_char_boundary(limit_bytes / 4);
    let end = text.ceil_char_boundary(text.len() - (limit_bytes - limit_bytes / 4));
    Cow::Owned(format!("{}…{}", &text[..head], &text[end..]))
}

fn is_obeyed(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t')
}

/// How long what follows an escape character and belongs to it is; `None`: it has no end here.
fn escape_length(after: &str) -> Option<usize> {
    let rest = after.get(1..)?;
    match after.chars().next()? {
        '[' => Some(1 + parameters_length(rest)?),
        // A title, a link and the like, up to a bell or an escape character and a backslash.
        ']' | 'P' | 'X' | '^' | '_' => {
            let ends = [rest.find(BELL).map(|at| at + 1), rest.find("\u{1b}\\").map(|at| at + 2)];
            Some(1 + ends.into_iter().flatten().min()?)
        }
        // A character set and the like.
        ' '..='/' => ends_with(rest, ' '..='/', '0'..='~').map(|length| 1 + length),
        '0'..='~' => Some(1),
        _ => None,
    }
}

/// The length of a control sequence's parameters and of the letter that ends it.
fn parameters_length(text: &str) -> Option<usize> {
    ends_with(text, ' '..='?', '@'..='~')
}

/// The length of any number of characters of `before`, and of one of `last` after them. All of these take one byte.
fn ends_with(text: &str, before: RangeInclusive<char>, last: RangeInclusive<char>) -> Option<usize> {
    let (end, c) = text.char_indices().find(|(_, c)| !before.contains(c))?;
    last.contains(&c).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_that_a_terminal_obeys() {
        assert!(matches!(plain("a line\n\tand é"), Cow::Borrowed(_)));
        for (said, shown) in [
            ("\u{1b}[1;31mERROR\u{1b}[0m gone", "ERROR gone"),
            ("\u{1b}]0;title\u{7}a\u{1b}]8;;http://x\u{1b}\\b\u{9b}2Jc", "abc"),
            ("\u{1b}(Ba\u{1b}=b\u{1b}Mc", "abc"),
            ("\0\0\0bad\u{7}\0end", " bad end"),
            ("10%\r20%\r\u{8}30%", "10% 20% 30%"),
            ("\u{1b}]no end, \u{1b}[12", " ]no end,  [12"),
            ("\u{1b}", " "),
            ("\u{1b}[3é\u{1b}é\u{1b}(é", " [3é é (é"),
            ("a\u{85}b\u{7f}c", "a b c"),
        ] {
            assert_eq!(plain(said), shown, "{said:?}");
        }
    }

    #[test]
    fn a_long_line_keeps_its_end() {
        assert_eq!(without_middle("short", 5), "short");
        let long = format!("ValueError: {}the point", "x".repeat(1_000));
        let shown = without_middle(&long, 100);
        assert!(shown.starts_with("ValueError: ") && shown.ends_with("xthe point"), "{shown}");
        assert_eq!(shown.len(), 100 + "…".len());
        assert_eq!(without_middle("éééééé", 7), "…ééé", "no character is cut");
    }
}
