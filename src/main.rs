//! Parses flags and calls the library; nothing else.
fn main() {}
