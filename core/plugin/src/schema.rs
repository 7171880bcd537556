//! The configuration's schema: the part of JSON Schema (draft 2020-12) that describes a configuration file. An unknown keyword is
//! refused, so that no author believes in a check that is not made.
//!
//! Known: `type`, `properties`, `required`, `additionalProperties` (a boolean, false if absent), `items`, `enum`, `default`,
//! `minimum`, `maximum`, `minLength`, `maxLength`, `minItems`, `maxItems`, `title`, `description`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Object,
    Array,
    String,
    Integer,
    Number,
    Boolean,
}

/// A schema, or a part of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Schema {
    r#type: Kind,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    properties: BTreeMap<String, Schema>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    required: Vec<String>,
    #[serde(default)]
    additional_properties: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    items: Option<Box<Schema>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#enum: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    minimum: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    maximum: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_length: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_length: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_items: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_items: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

impl Schema {
    /// Reads a schema and checks that its own defaults fit it.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(value: Value) -> Result<Self, String> {
        let schema: Self = serde_json::from_value(value).map_err(|error| error.to_string())?;
        if schema.r#type != Kind::Object {
            return Err("the configuration as a whole has type \"object\"".to_owned());
        }
        schema.sound("config")?;
        Ok(schema)
    }

    fn sound(&self, at: &str) -> Result<(), String> {
        if let Some(name) = self.required.iter().find(|name| !self.properties.contains_key(*name)) {
            return Err(format!("{at}: {name:?} is required and not among the properties"));
        }
        if let Some(default) = &self.default {
            self.apply(default.clone(), at).map_err(|error| format!("the default does not fit: {error}"))?;
        }
        for (name, property) in &self.properties {
            property.sound(&format!("{at}.{name}"))?;
        }
        self.items.as_ref().map_or(Ok(()), |items| items.sound(&format!("{at}[]")))
    }

    /// The value with defaults filled in.
    ///
    /// # Errors
    /// The first place that does not fit, and why.
    pub fn fill(&self, value: Value) -> Result<Value, String> {
        self.apply(value, "config")
    }

    fn apply(&self, value: Value, at: &str) -> Result<Value, String> {
        if let Some(choices) = &self.r#enum
            && !choices.contains(&value)
        {
            let choices = choices.iter().map(Value::to_string).collect::<Vec<_>>().join(", ");
            return Err(format!("{at} is {value}; it may be {choices}"));
        }
        match (self.r#type, value) {
            (Kind::Object, Value::Object(map)) => self.object(map, at),
            (Kind::Array, Value::Array(list)) => {
                Self::between(list.len(), self.min_items, self.max_items, at, "items")?;
                let each = list.into_iter().enumerate();
                let items = each.map(|(index, item)| match &self.items {
                    Some(items) => items.apply(item, &format!("{at}[{index}]")),
                    None => Ok(item),
                });
                Ok(Value::Array(items.collect::<Result<_, _>>()?))
            }
            (Kind::String, Value::String(text)) => {
                Self::between(text.chars().count(), self.min_length, self.max_length, at, "characters")?;
                Ok(Value::String(text))
            }
            (Kind::Boolean, value @ Value::Bool(_)) => Ok(value),
            (kind @ (Kind::Integer | Kind::Number), Value::Number(number)) => {
                if kind == Kind::Integer && !(number.is_i64() || number.is_u64()) {
                    return Err(format!("{at} is {number}; it must be a whole number"));
                }
                let size = number.as_f64().unwrap_or(f64::NAN);
                if self.minimum.is_some_and(|least| size < least) {
                    return Err(format!(
                        "{at} is {number}; the least is {}",
                        self.minimum.unwrap_or_default()
                    ));
                }
                if self.maximum.is_some_and(|most| size > most) {
                    return Err(format!(
                        "{at} is {number}; the most is {}",
                        self.maximum.unwrap_or_default()
                    ));
                }
                Ok(Value::Number(number))
            }
            (kind, other) => {
                Err(format!("{at} is {other}; it must be of type {}", format!("{kind:?}").to_lowercase()))
            }
        }
    }

    fn object(&self, mut map: Map<String, Value>, at: &str) -> Result<Value, String> {
        if !self.additional_properties
            && let Some(name) = map.keys().find(|name| !self.properties.contains_key(*name))
        {
            let known = self.properties.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(format!("{at} has no {name:?}; there is: {known}"));
        }
        for (name, property) in &self.properties {
            match map.remove(name).or_else(|| property.default.clone()) {
                Some(value) => _ = map.insert(name.clone(), property.apply(value, &format!("{at}.{name}"))?),
                None if self.required.contains(name) => return Err(format!("{at}.{name} is missing")),
                // Its own parts may have defaults.
                None if property.r#type == Kind::Object && property.required.is_empty() => {
                    _ = map.insert(name.clone(), property.object(Map::new(), &format!("{at}.{name}"))?);
                }
                None => {}
            }
        }
        Ok(Value::Object(map))
    }

    fn between(
        size: usize,
        least: Option<usize>,
        most: Option<usize>,
        at: &str,
        what: &str,
    ) -> Result<(), String> {
        match (least, most) {
            (Some(least), _) if size < least => Err(format!("{at} has {size} {what}; the least is {least}")),
            (_, Some(most)) if size > most => Err(format!("{at} has {size} {what}; the most is {most}")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Schema {
        Schema::parse(json!({
            "type": "object",
            "required": ["size"],
            "properties": {
                "size": { "type": "integer", "minimum": 1, "maximum": 64 },
                "mode": { "type": "string", "enum": ["a", "b"], "default": "a" },
                "names": { "type": "array", "items": { "type": "string", "maxLength": 3 }, "maxItems": 2 },
                "more": { "type": "object", "properties": { "on": { "type": "boolean", "default": true } } },
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_schema_can_be_shown_as_it_was_written() {
        let shown = serde_json::to_value(schema()).unwrap();
        assert_eq!(shown["properties"]["mode"]["default"], "a");
        assert!(shown["properties"]["size"].get("enum").is_none(), "{shown}");
        assert_eq!(Schema::parse(shown).unwrap(), schema());
    }

    #[test]
    fn defaults_are_filled_in_at_every_depth() {
        let filled = schema().fill(json!({ "size": 3 })).unwrap();
        assert_eq!(filled, json!({ "size": 3, "mode": "a", "more": { "on": true } }));
    }

    #[test]
    fn a_misfit_is_named_with_its_place() {
        for (value, place) in [
            (json!({}), "config.size is missing"),
            (json!({ "size": 65 }), "config.size is 65; the most is 64"),
            (json!({ "size": 1.5 }), "whole number"),
            (json!({ "size": 1, "mode": "c" }), "it may be \"a\", \"b\""),
            (json!({ "size": 1, "names": ["abc", "abcd"] }), "config.names[1] has 4 characters"),
            (json!({ "size": 1, "names": ["", "", ""] }), "config.names has 3 items"),
            (json!({ "size": 1, "more": { "off": true } }), "config.more has no \"off\""),
            (json!({ "size": "1" }), "of type integer"),
            (json!([]), "of type object"),
        ] {
            let error = schema().fill(value).unwrap_err();
            assert!(error.contains(place), "{error}");
        }
    }

    #[test]
    fn a_schema_that_promises_more_than_is_checked_is_refused() {
        let with = |key: &str, value: Value| {
            Schema::parse(
                json!({ "type": "object", "properties": { "x": { "type": "string", key: value } } }),
            )
        };
        assert!(with("pattern", json!("^a$")).unwrap_err().contains("pattern"));
        assert!(with("default", json!(1)).unwrap_err().contains("the default does not fit: config.x"));
        assert!(Schema::parse(json!({ "type": "object", "required": ["y"] })).unwrap_err().contains("\"y\""));
    }
}
