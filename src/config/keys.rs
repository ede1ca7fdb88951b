//! Misspelt and doubled keys, found by walking the file beside its JSON Schema: one list of known keys.

use std::cell::Cell;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::Problems;
use super::file::{At, File, options};

/// A piece of the file as it was written, without its values.
#[derive(Debug)]
pub(super) struct Node {
    shape: Shape,
}

#[derive(Debug)]
enum Shape {
    Map(Vec<(At<String>, Node)>),
    List(Vec<Node>),
    Scalar,
    Nothing,
}

impl Node {
    /// Reads a file of any shape; an error here means that it is no YAML.
    pub(super) fn parse(text: &str) -> Result<Self, serde_saphyr::Error> {
        let mut options = options();
        options.duplicate_keys = serde_saphyr::DuplicateKeyPolicy::PassThrough;
        serde_saphyr::from_str_with_options(text, options)
    }

    /// The innermost key on a line, as `models.flux.port`.
    pub(super) fn path_at(&self, line: usize) -> Option<String> {
        let Shape::Map(entries) = &self.shape else {
            return None;
        };
        let (key, node) = entries.iter().rfind(|(key, _)| key.line <= line)?;
        match node.path_at(line) {
            Some(rest) => Some(format!("{}.{rest}", key.value)),
            None => Some(key.value.clone()),
        }
    }
}

/// Adds a problem for each key that `File` does not know, that stands twice, or that has a value where a map belongs. Says
/// whether there is one of the last kind, since then the file cannot be read.
pub(super) fn check(tree: &Node, problems: &mut Problems) -> bool {
    let schema = schemars::schema_for!(File).to_value();
    let walk = Walk { root: &schema, lacks_map: Cell::new(false) };
    walk.node(tree, &schema, &mut Vec::new(), problems);
    walk.lacks_map.get()
}

struct Walk<'a> {
    root: &'a Value,
    lacks_map: Cell<bool>,
}

impl<'a> Walk<'a> {
    fn node(&self, node: &Node, schema: &'a Value, path: &mut Vec<String>, problems: &mut Problems) {
        match &node.shape {
            Shape::Scalar | Shape::Nothing => {}
            Shape::List(items) => items.iter().for_each(|item| self.node(item, schema, path, problems)),
            Shape::Map(entries) => {
                doubled(entries, path, problems);
                let Some(schema) = self.object(schema) else {
                    return;
                };
                for (key, child) in entries {
                    let Some(inner) = known(schema, &key.value) else {
                        problems.add(key.line, refusal(&key.value, path, schema));
                        continue;
                    };
                    path.push(key.value.clone());
                    if matches!(child.shape, Shape::Scalar | Shape::List(_))
                        && let Some(map) = self.object(inner)
                    {
                        self.lacks_map.set(true);
                        problems.add(key.line, format!("{}: must be a map, {}", path.join("."), example_of(map)));
                    }
                    self.node(child, inner, path, problems);
                    path.pop();
                }
            }
        }
    }

    /// The schema's object form, behind references and alternatives.
    fn object(&self, schema: &'a Value) -> Option<&'a Value> {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            return self.object(self.root.pointer(reference.trim_start_matches('#'))?);
        }
        if let Some(options) = schema.get("anyOf").and_then(Value::as_array) {
            return options.iter().find_map(|option| self.object(option));
        }
        (schema.get("properties").is_some() || schema.get("additionalProperties").is_some()).then_some(schema)
    }
}

/// The schema of a key's value, if the key is known.
fn known<'a>(schema: &'a Value, key: &str) -> Option<&'a Value> {
    let property = schema.get("properties").and_then(|all| all.get(key));
    property.or_else(|| schema.get("additionalProperties").filter(|more| **more != Value::Bool(false)))
}

/// What stands in a map, for a person who wrote something else.
fn example_of(map: &Value) -> String {
    let keys = map.get("properties").and_then(Value::as_object);
    let names: Vec<&str> = keys.into_iter().flat_map(|keys| keys.keys()).map(String::as_str).collect();
    if names.is_empty() {
        "as `name: value` on lines of their own below it".to_owned()
    } else {
        format!("its settings on lines of their own below it: {}", names.join(", "))
    }
}

fn doubled(entries: &[(At<String>, Node)], path: &[String], problems: &mut Problems) {
    for (index, (key, _)) in entries.iter().enumerate() {
        let first = entries[..index].iter().find(|(earlier, _)| earlier.value == key.value);
        if let Some((first, _)) = first {
            problems.add(
                key.line,
                format!("`{}` stands twice in {}, first on line {}; remove one", key.value, place(path), first.line),
            );
        }
    }
}

fn refusal(key: &str, path: &[String], schema: &Value) -> String {
    let here = place(path);
    let names = schema.get("properties").and_then(Value::as_object);
    let nearest = names
        .into_iter()
        .flat_map(|names| names.keys())
        .map(|name| (strsim::damerau_levenshtein(key, name), name))
        .min()
        .filter(|(distance, name)| *distance <= 1 + name.len().max(key.len()) / 4);
    match nearest {
        Some((_, name)) => format!("unknown key `{key}` in {here}; did you mean `{name}`?"),
        None => {
            let names: Vec<&str> = names.into_iter().flat_map(|names| names.keys()).map(String::as_str).collect();
            format!("unknown key `{key}` in {here}; known keys: {}", names.join(", "))
        }
    }
}

fn place(path: &[String]) -> String {
    if path.is_empty() { "the file".to_owned() } else { path.join(".") }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyShape).map(|shape| Self { shape })
    }
}

struct AnyShape;

impl<'de> Visitor<'de> for AnyShape {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shape, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Shape::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Shape::List(items))
    }

    fn visit_str<E>(self, _: &str) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Shape, E> {
        Ok(Shape::Nothing)
    }

    fn visit_none<E>(self) -> Result<Shape, E> {
        Ok(Shape::Nothing)
    }
}
