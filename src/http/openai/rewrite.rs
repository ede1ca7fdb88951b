//! Rewriting the top level of a JSON object without parsing what is below it: cheap enough for every chunk of a stream.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The fields of an object, in order, values untouched.
pub struct TopLevel<'a> {
    fields: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

impl<'de> Deserialize<'de> for TopLevel<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = TopLevel<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TopLevel<'de>, A::Error> {
                let mut fields = Vec::with_capacity(12);
                while let Some((key, value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    fields.push((key.0, Cow::Borrowed(value.get())));
                }
                Ok(TopLevel { fields })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl<'a> TopLevel<'a> {
    /// Splits an object; `None` if the bytes are no JSON object.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    /// The raw text of a field.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_ref())
    }

    /// Sets a field to a string, where it stands or at the end.
    pub fn set(&mut self, name: &'static str, value: &str) {
        let value = Cow::Owned(serde_json::Value::String(value.to_owned()).to_string());
        match self.fields.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = value,
            None => self.fields.push((Cow::Borrowed(name), value)),
        }
    }

    /// Takes a field out.
    pub fn remove(&mut self, name: &str) {
        self.fields.retain(|(key, _)| key != name);
    }

    /// Appends the object as JSON.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        for (index, (key, value)) in self.fields.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            // Writing a string into memory cannot fail.
            let _ = serde_json::to_writer(&mut *out, key);
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        }
        out.push(b'}');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(top: &TopLevel<'_>) -> String {
        let mut out = Vec::new();
        top.write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn only_the_named_fields_change() {
        let text = r#"{ "id" : "x", "big": 123456789012345678901234567890, "e": 1.0e2,
            "deep": {"id": "y", "a\n": [1, 2]}, "model":"m", "k\u0022": null }"#;
        let mut top = TopLevel::parse(text.as_bytes()).unwrap();
        top.set("id", "chatcmpl-\"1\"");
        top.set("model", "flux");
        top.set("new", "é");
        top.remove("e");
        assert_eq!(
            written(&top),
            r#"{"id":"chatcmpl-\"1\"","big":123456789012345678901234567890,"deep":{"id": "y", "a\n": [1, 2]},"model":"flux","k\"":null,"new":"é"}"#
        );
        assert_eq!(top.get("deep"), Some(r#"{"id": "y", "a\n": [1, 2]}"#));
    }

    #[test]
    fn what_is_no_object_is_left_alone() {
        for text in ["[1]", "3", "", "{\"a\":}", "{\"a\":1} x"] {
            assert!(TopLevel::parse(text.as_bytes()).is_none(), "{text}");
        }
        assert_eq!(written(&TopLevel::parse(b"{}").unwrap()), "{}");
    }
}
