//! A plugin's configuration from the command line: `KEY=VALUE`, read by the type its schema gives, and JSON files.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use crate::errors::CliError;

/// A configuration, without defaults.
pub(super) type Config = Map<String, Value>;

fn usage(message: String, hint: impl Into<String>) -> CliError {
    CliError::Usage { message, hint: hint.into() }
}

/// What `--config` gives, over what there is: files and assignments, later ones over earlier ones.
pub(super) fn add(config: &mut Config, schema: &Value, texts: &[String]) -> Result<(), CliError> {
    for text in texts {
        if text.contains('=') && !Path::new(text).is_file() {
            assign(config, schema, text)?;
        } else {
            config.extend(file(Path::new(text))?);
        }
    }
    Ok(())
}

/// A configuration of a JSON file.
pub(super) fn file(path: &Path) -> Result<Config, CliError> {
    let text = fs::read_to_string(path).map_err(|source| CliError::File { path: path.to_owned(), source })?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(config)) => Ok(config),
        Ok(_) => Err(usage(
            format!("{} holds no JSON object", path.display()),
            "a configuration is an object like {\"key\": 1}",
        )),
        Err(error) => {
            Err(usage(format!("{} is no JSON: {error}", path.display()), "write it like {\"key\": 1}"))
        }
    }
}

/// Sets what `KEY=VALUE` says; a key of an object within is `OUTER.INNER`.
pub(super) fn assign(config: &mut Config, schema: &Value, text: &str) -> Result<(), CliError> {
    let Some((key, value)) = text.split_once('=').filter(|(key, _)| !key.is_empty()) else {
        return Err(usage(format!("{text:?} is no KEY=VALUE"), "for example max-cpus=4"));
    };
    let property = |schema: &Value, key: &str| schema.get("properties").and_then(|all| all.get(key)).cloned();
    if let Some((outer, inner)) = key.split_once('.')
        && property(schema, key).is_none()
        && let Some(within) = property(schema, outer)
        && within["type"] == "object"
    {
        let slot = config.entry(outer).or_insert_with(|| Value::Object(Map::new()));
        if !slot.is_object() {
            *slot = Value::Object(Map::new());
        }
        let Value::Object(slot) = slot else { return Ok(()) };
        return assign(slot, &within, &format!("{inner}={value}"));
    }
    let value = match property(schema, key) {
        Some(property) => read(key, &property, value)?,
        None if schema["additionalProperties"] == true => guess(value),
        None => {
            let known: Vec<_> = schema["properties"].as_object().into_iter().flat_map(Map::keys).collect();
            let known: Vec<_> = known.into_iter().map(String::as_str).collect();
            let hint = match known.as_slice() {
                [] => "this plugin has nothing to configure".to_owned(),
                known => format!("there is: {}", known.join(", ")),
            };
            return Err(usage(format!("there is no configuration key {key:?}"), hint));
        }
    };
    config.insert(key.to_owned(), value);
    Ok(())
}

/// JSON where it is some, a text otherwise.
fn guess(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

fn read(key: &str, schema: &Value, text: &str) -> Result<Value, CliError> {
    let kind = schema["type"].as_str().unwrap_or_default();
    let json = || serde_json::from_str::<Value>(text).ok();
    let value = match kind {
        "string" => return Ok(Value::String(text.to_owned())),
        "integer" => json().filter(|value| value.is_i64() || value.is_u64()),
        "number" => json().filter(Value::is_number),
        "boolean" => json().filter(Value::is_boolean),
        "object" => json().filter(Value::is_object),
        "array" => match json().filter(Value::is_array) {
            Some(list) => Some(list),
            None if text.is_empty() => Some(Value::Array(Vec::new())),
            None => {
                let items = text.split(',').map(|item| read(key, &schema["items"], item.trim()));
                return items.collect::<Result<_, _>>().map(Value::Array);
            }
        },
        _ => Some(guess(text)),
    };
    let article = if matches!(kind, "integer" | "object") { "an" } else { "a" };
    let like = match kind {
        "boolean" => "true or false",
        "object" => "{\"key\": 1}",
        _ => "4",
    };
    value.ok_or_else(|| {
        usage(format!("{key}: {text:?} is not {article} {kind}"), format!("write for example {key}={like}"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({"type": "object", "properties": {
            "max-cpus": {"type": "integer"},
            "ratio": {"type": "number"},
            "title": {"type": "string"},
            "on": {"type": "boolean"},
            "labels": {"type": "array", "items": {"type": "string"}},
            "ports": {"type": "array", "items": {"type": "integer"}},
            "env": {"type": "object", "additionalProperties": true},
        }})
    }

    fn set(texts: &[&str]) -> Result<Value, CliError> {
        let mut config = Config::new();
        let texts: Vec<_> = texts.iter().map(|text| (*text).to_owned()).collect();
        add(&mut config, &schema(), &texts).map(|()| Value::Object(config))
    }

    #[test]
    fn values_are_read_by_the_type_that_the_schema_gives() {
        let texts =
            ["max-cpus=4", "ratio=0.5", "title=4", "on=true", "labels=a, b", "ports=[1,2]", "env.A=1"];
        let expected = json!({
            "max-cpus": 4, "ratio": 0.5, "title": "4", "on": true, "labels": ["a", "b"], "ports": [1, 2],
            "env": {"A": 1},
        });
        assert_eq!(set(&texts).unwrap(), expected);
        assert_eq!(
            set(&["labels=", "title=a=b", "env.B=x"]).unwrap(),
            json!({"labels": [], "title": "a=b", "env": {"B": "x"}})
        );
    }

    #[test]
    fn what_does_not_fit_is_told_with_what_would() {
        for (text, message, hint) in [
            ("max-cpus=four", "\"four\" is not an integer", "max-cpus=4"),
            ("max-cpus=1.5", "not an integer", "max-cpus=4"),
            ("on=yes", "not a boolean", "on=true or false"),
            ("ports=1,x", "\"x\" is not an integer", "ports="),
            ("cpus=4", "no configuration key \"cpus\"", "max-cpus"),
            ("=4", "no KEY=VALUE", "max-cpus=4"),
        ] {
            let error = set(&[text]).unwrap_err();
            assert!(error.to_string().contains(message), "{text}: {error}");
            assert!(error.hint().unwrap().contains(hint), "{text}: {:?}", error.hint());
        }
    }

    #[test]
    fn a_file_holds_an_object_and_what_comes_later_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a=b.json");
        let name = path.to_str().unwrap();
        fs::write(&path, r#"{"max-cpus": 2, "title": "x"}"#).unwrap();
        assert_eq!(set(&[name, "max-cpus=3"]).unwrap(), json!({"max-cpus": 3, "title": "x"}));
        fs::write(&path, "[]").unwrap();
        assert!(set(&[name]).unwrap_err().to_string().contains("no JSON object"));
        fs::write(&path, "{").unwrap();
        assert!(set(&[name]).unwrap_err().to_string().contains("is no JSON"));
        assert!(matches!(set(&["gone.json"]), Err(CliError::File { .. })));
    }
}
