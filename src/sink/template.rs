//! Names of streams and channels with the placeholders `{event_type}`, `{aggregate_type}` and `{source}`. A literal brace is
//! written twice: `{{{source}}}:{event_type}` gives `{shop}:order.created`. In a Redis Cluster the slot of such a name depends
//! only on the text in the braces.

use std::borrow::Cow;

use crate::event::Event;
use crate::sink::cloudevent;

/// A name with placeholders. It is checked when it is parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    EventType,
    AggregateType,
    Source,
}

/// Why a template cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The name has no characters.
    #[error("the name is empty")]
    Empty,
    /// A brace has no matching brace.
    #[error("a {{ or }} without its partner in {0:?}; one that is meant as such is written twice")]
    Brace(String),
    /// There is no placeholder of this name.
    #[error("unknown placeholder {{{0}}}; there are {{event_type}}, {{aggregate_type}} and {{source}}")]
    Placeholder(String),
}

/// Prints the template as it is written in a configuration.
impl std::fmt::Display for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(&text.replace('{', "{{").replace('}', "}}")),
            Part::EventType => f.write_str("{event_type}"),
            Part::AggregateType => f.write_str("{aggregate_type}"),
            Part::Source => f.write_str("{source}"),
        })
    }
}

impl std::str::FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        if text.is_empty() {
            return Err(TemplateError::Empty);
        }
        let brace = || TemplateError::Brace(text.to_owned());
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while !rest.is_empty() {
            let open = rest.find(['{', '}']).unwrap_or(rest.len());
            literal.push_str(&rest[..open]);
            rest = &rest[open..];
            if rest.is_empty() {
                break;
            }
            if rest.starts_with("{{") || rest.starts_with("}}") {
                literal.push_str(&rest[..1]);
                rest = &rest[2..];
                continue;
            }
            if !literal.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut literal)));
            }
            let close = rest.find('}').filter(|_| rest.starts_with('{')).ok_or_else(brace)?;
            parts.push(match &rest[1..close] {
                "event_type" => Part::EventType,
                "aggregate_type" => Part::AggregateType,
                "source" => Part::Source,
                other => return Err(TemplateError::Placeholder(other.to_owned())),
            });
            rest = &rest[close + 1..];
        }
        if !literal.is_empty() {
            parts.push(Part::Text(literal));
        }
        Ok(Self(parts))
    }
}

impl Template {
    /// Returns the name if the template has no placeholder.
    pub fn fixed(&self) -> Option<&str> {
        match self.0.as_slice() {
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Returns the name for `event`. A placeholder for which the event has no value becomes empty.
    pub fn render(&self, event: &Event, default_source: &str) -> Cow<'_, str> {
        if let Some(text) = self.fixed() {
            return Cow::Borrowed(text);
        }
        let mut name = String::new();
        for part in &self.0 {
            name.push_str(match part {
                Part::Text(text) => text,
                Part::EventType => &event.event_type,
                Part::AggregateType => event.aggregate_type.as_deref().unwrap_or_default(),
                Part::Source => cloudevent::source(event, default_source),
            });
        }
        Cow::Owned(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::keyed;

    fn template(text: &str) -> Template {
        text.parse().expect(text)
    }

    #[test]
    fn placeholders_are_filled_from_the_event() {
        let event = keyed(1, "42");
        assert_eq!(template("events").render(&event, "s"), "events");
        assert_eq!(template("{event_type}").render(&event, "s"), "order.created");
        assert_eq!(template("a:{aggregate_type}/{source}!").render(&event, "s"), "a:order/s!");
        assert_eq!(template("{{{source}}}:{event_type}").render(&event, "s"), "{s}:order.created");
        assert_eq!(template("{{a}}").fixed(), Some("{a}"));
        assert_eq!(template("events").fixed(), Some("events"));
        assert_eq!(template("{source}").fixed(), None);
    }

    #[test]
    fn a_bad_template_says_what_is_wrong() {
        let error = |text: &str| text.parse::<Template>().expect_err(text).to_string();
        assert_eq!(error(""), "the name is empty");
        assert_eq!(
            error("a{b"),
            r#"a { or } without its partner in "a{b"; one that is meant as such is written twice"#
        );
        assert_eq!(
            error("a}b{"),
            r#"a { or } without its partner in "a}b{"; one that is meant as such is written twice"#
        );
        assert_eq!(error("a{key}"), "unknown placeholder {key}; there are {event_type}, {aggregate_type} and {source}");
    }
}
