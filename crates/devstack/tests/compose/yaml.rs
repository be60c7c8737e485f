//! YAML as JSON, and what is read of it.

use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub(super) fn list(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

pub(super) fn seconds(value: &Value) -> Option<u64> {
    text(value).strip_suffix('s')?.parse().ok()
}

pub(super) fn parse(yaml: &str) -> Value {
    json(&YamlLoader::load_from_str(yaml).unwrap()[0])
}

/// As JSON, with merge keys (`<<`) resolved, which the YAML reader leaves to its users.
pub(super) fn json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Array(all) => all.iter().map(json).collect(),
        Yaml::Hash(all) => {
            let mut object = serde_json::Map::new();
            let mut inherited = serde_json::Map::new();
            for (key, value) in all {
                match (key.as_str().unwrap(), json(value)) {
                    ("<<", Value::Object(merged)) => inherited.extend(merged),
                    (key, value) => drop(object.insert(key.to_owned(), value)),
                }
            }
            for (key, value) in inherited {
                object.entry(key).or_insert(value);
            }
            Value::Object(object)
        }
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Integer(value) => (*value).into(),
        Yaml::Null => Value::Null,
        other => other.as_str().map_or_else(|| format!("{other:?}"), str::to_owned).into(),
    }
}
