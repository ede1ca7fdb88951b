//! Server-sent events, as far as engines use them: `data:` lines, comments, events ended by an empty line.

use bytes::{Buf, Bytes, BytesMut};

/// Longest event: its data and a line that is not complete yet, in bytes.
pub(super) const EVENT_LIMIT_BYTES: usize = 4 << 20;

/// An event is longer than [`EVENT_LIMIT_BYTES`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is longer than {EVENT_LIMIT_BYTES} bytes")]
pub(super) struct TooLong;

/// Cuts a byte stream into the data of its events.
#[derive(Debug, Default)]
pub(super) struct Parser {
    buffer: BytesMut,
    /// Bytes at the start of `buffer` that hold no line end.
    searched: usize,
    data: Option<Bytes>,
}

impl Parser {
    /// Adds bytes as they came from the network.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The data of the next complete event; `None` until more bytes come.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, TooLong> {
        while let Some(line) = self.line() {
            if line.is_empty() {
                if let Some(data) = self.data.take() {
                    return Ok(Some(data));
                }
            } else {
                self.take_line(&line);
            }
            self.check_length()?;
        }
        self.check_length()?;
        Ok(None)
    }

    /// At the end of the stream: an event that its empty line is missing from.
    pub(super) fn last(&mut self) -> Option<Bytes> {
        let line = std::mem::take(&mut self.buffer).freeze();
        if !line.is_empty() {
            self.take_line(&trim_cr(line));
        }
        self.data.take()
    }

    fn line(&mut self) -> Option<Bytes> {
        let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let line = self.buffer.split_to(self.searched + at).freeze();
        self.buffer.advance(1);
        self.searched = 0;
        Some(trim_cr(line))
    }

    fn take_line(&mut self, line: &Bytes) {
        let Some(rest) = line.strip_prefix(b"data:") else {
            return; // A comment, `event:`, `id:` or `retry:`.
        };
        let value = line.slice_ref(rest.strip_prefix(b" ").unwrap_or(rest));
        self.data = Some(match self.data.take() {
            None => value,
            Some(before) => [&before[..], b"\n", &value[..]].concat().into(),
        });
    }

    fn check_length(&self) -> Result<(), TooLong> {
        let data = self.data.as_ref().map_or(0, Bytes::len);
        if data > EVENT_LIMIT_BYTES || self.buffer.len() > EVENT_LIMIT_BYTES && self.searched > 0 {
            return Err(TooLong);
        }
        Ok(())
    }
}

fn trim_cr(mut line: Bytes) -> Bytes {
    if line.last() == Some(&b'\r') {
        line.truncate(line.len() - 1);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut parser = Parser::default();
        let mut found = Vec::new();
        for piece in pieces {
            parser.push(piece);
            while let Some(event) = parser.next().unwrap() {
                found.push(event.to_vec());
            }
        }
        found.extend(parser.last().map(|e| e.to_vec()));
        found
    }

    const STREAM: &[u8] = b": hello\r\n\r\ndata: {\"a\":1}\r\n\r\nevent: x\nid: 7\ndata:two\ndata: lines\n\n: keep-alive\n\ndata: [DONE]\n\n";

    #[test]
    fn finds_events_however_the_bytes_are_cut() {
        let expected: Vec<Vec<u8>> = vec![b"{\"a\":1}".to_vec(), b"two\nlines".to_vec(), b"[DONE]".to_vec()];
        assert_eq!(events(&[STREAM]), expected);
        for size in 1..STREAM.len() {
            let pieces: Vec<&[u8]> = STREAM.chunks(size).collect();
            assert_eq!(events(&pieces), expected, "pieces of {size} bytes");
        }
    }

    #[test]
    fn takes_an_event_without_its_empty_line_at_the_end() {
        assert_eq!(events(&[b"data: 1\n\ndata: 2"]), [b"1", b"2"]);
    }

    #[test]
    fn refuses_an_endless_event() {
        let mut parser = Parser::default();
        parser.push(b"data: ");
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..6).any(|_| {
            parser.push(&piece);
            parser.next() == Err(TooLong)
        });
        assert!(refused);
    }

    #[test]
    fn refuses_endless_lines_of_one_event() {
        let mut parser = Parser::default();
        let line = [b"data: ".as_slice(), &vec![b'x'; 1 << 20], b"\n"].concat();
        let refused = (0..6).any(|_| {
            parser.push(&line);
            parser.next() == Err(TooLong)
        });
        assert!(refused);
    }
}
