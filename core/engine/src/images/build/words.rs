//! Words of a build file: where they end, and what quotes, escapes and variables in them come to
//! (<https://docs.docker.com/reference/dockerfile/#environment-replacement>).

/// A word that cannot be understood, in words.
pub(super) type Problem = String;

/// Splits a text at blanks, but not within quotes; quotes and escapes stay for [`expand`].
pub(super) fn split(text: &str, escape: char) -> Result<Vec<String>, Problem> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            // Nothing but its end means anything between single quotes.
            (c, Some('\'')) => {
                word.push(c);
                if c == '\'' {
                    quote = None;
                }
            }
            (c, _) if c == escape => {
                word.push(c);
                word.extend(chars.next());
            }
            ('"', Some(_)) => {
                word.push(c);
                quote = None;
            }
            ('"' | '\'', None) => {
                word.push(c);
                quote = Some(c);
            }
            (c, None) if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            (c, _) => word.push(c),
        }
    }
    if let Some(quote) = quote {
        return Err(format!("a quote {quote} has no end"));
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// What a word comes to: quotes and escapes are taken away, variables replaced. One that nothing is known of is empty.
pub(super) fn expand(
    word: &str,
    escape: char,
    value: &dyn Fn(&str) -> Option<String>,
) -> Result<String, Problem> {
    let chars: Vec<char> = word.chars().collect();
    Words { chars: &chars, at: 0, escape, quotes: true, value }.until(None)
}

/// What the text of a file comes to: as [`expand`], but quotes stay, and the escape is always a backslash.
pub(super) fn expand_text(text: &str, value: &dyn Fn(&str) -> Option<String>) -> Result<String, Problem> {
    let chars: Vec<char> = text.chars().collect();
    Words { chars: &chars, at: 0, escape: '\\', quotes: false, value }.until(None)
}

struct Words<'a> {
    chars: &'a [char],
    at: usize,
    escape: char,
    /// They mean something.
    quotes: bool,
    value: &'a dyn Fn(&str) -> Option<String>,
}

impl Words<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += 1;
        Some(next)
    }

    /// Up to `end`, which is taken too, or to the end of all.
    fn until(&mut self, end: Option<char>) -> Result<String, Problem> {
        let mut text = String::new();
        loop {
            let Some(c) = self.next() else {
                return match end {
                    None => Ok(text),
                    Some(end) => Err(format!("there is no {end}")),
                };
            };
            match c {
                c if Some(c) == end => return Ok(text),
                '\'' if self.quotes => loop {
                    match self.next() {
                        Some('\'') => break,
                        Some(c) => text.push(c),
                        None => return Err("a quote ' has no end".into()),
                    }
                },
                '"' if self.quotes => text.push_str(&self.quoted()?),
                '$' => text.push_str(&self.variable()?),
                // One at the very end stands for itself.
                c if c == self.escape => text.push(self.next().unwrap_or(c)),
                c => text.push(c),
            }
        }
    }

    /// What stands between double quotes, where an escape is one before what means something there only.
    fn quoted(&mut self) -> Result<String, Problem> {
        let mut text = String::new();
        loop {
            match self.next().ok_or("a quote \" has no end")? {
                '"' => return Ok(text),
                '$' => text.push_str(&self.variable()?),
                c if c == self.escape => match self.next() {
                    Some(next) if next == '"' || next == '$' || next == self.escape => text.push(next),
                    Some(next) => text.extend([c, next]),
                    None => return Err("a quote \" has no end".into()),
                },
                c => text.push(c),
            }
        }
    }

    /// What stands behind a `$`.
    fn variable(&mut self) -> Result<String, Problem> {
        if self.peek() != Some('{') {
            let name = self.name();
            return Ok(if name.is_empty() {
                "$".to_owned()
            } else {
                (self.value)(&name).unwrap_or_default()
            });
        }
        self.at += 1;
        let name = self.name();
        if name.is_empty() {
            return Err("${ is followed by no name".into());
        }
        let known = (self.value)(&name);
        let colon = self.peek() == Some(':');
        if colon {
            self.at += 1;
        }
        // With a colon, an empty one is as good as none.
        let set = known.clone().filter(|value| !(colon && value.is_empty()));
        match self.next() {
            Some('}') if !colon => Ok(known.unwrap_or_default()),
            Some('-') => {
                let other = self.until(Some('}'))?;
                Ok(set.unwrap_or(other))
            }
            Some('+') => {
                let other = self.until(Some('}'))?;
                Ok(set.map(|_| other).unwrap_or_default())
            }
            Some('?') => {
                let message = self.until(Some('}'))?;
                let message = if message.is_empty() { "it is not set" } else { message.as_str() };
                set.ok_or_else(|| format!("{name}: {message}"))
            }
            Some(c) if !colon => Err(format!("${{{name}{c}: such a replacement is not supported")),
            _ => Err(format!("${{{name}: such a replacement is not supported")),
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.peek() {
            let fits = c == '_' || c.is_ascii_alphabetic() || (c.is_ascii_digit() && !name.is_empty());
            if !fits {
                break;
            }
            name.push(c);
            self.at += 1;
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(name: &str) -> Option<String> {
        match name {
            "A" => Some("a".into()),
            "EMPTY" => Some(String::new()),
            "SPACED" => Some("x y".into()),
            _ => None,
        }
    }

    fn expanded(word: &str) -> Result<String, Problem> {
        expand(word, '\\', &values)
    }

    #[test]
    fn variables_are_replaced_as_a_shell_would() {
        for (word, wanted) in [
            ("$A", "a"),
            ("${A}b", "ab"),
            ("$A_b", ""),
            ("x$A/y", "xa/y"),
            ("\\$A", "$A"),
            ("'$A'", "$A"),
            ("\"$A 'b'\"", "a 'b'"),
            ("\"\\\"\\x\"", "\"\\x"),
            ("a\\ b", "a b"),
            ("$", "$"),
            ("$1", "$1"),
            ("${NONE:-d}", "d"),
            ("${NONE-d}", "d"),
            ("${EMPTY:-d}", "d"),
            ("${EMPTY-d}", ""),
            ("${A:-d}", "a"),
            ("${A:+d}", "d"),
            ("${NONE:+d}", ""),
            ("${EMPTY+d}", "d"),
            ("${NONE:-${A}/${NONE:-e}}", "a/e"),
            ("${NONE:-'}'}", "}"),
            ("$SPACED", "x y"),
        ] {
            assert_eq!(expanded(word), Ok(wanted.to_owned()), "{word}");
        }
        assert_eq!(expand("C:\\x`$A", '`', &values), Ok("C:\\x$A".to_owned()));
        for bad in ["${A", "${}", "${A:x}", "${A%x}", "'a", "\"a", "${NONE:-x", "${A:"] {
            assert!(expanded(bad).is_err(), "{bad}");
        }
        assert!(expanded("${NONE:?say who}").unwrap_err().contains("say who"));
    }

    #[test]
    fn quotes_in_a_files_text_stay() {
        let text = "don't \"$A\" '${A}' \\$A \\\\ ${NONE:-'\"'}\n$EMPTY.\n";
        assert_eq!(expand_text(text, &values).unwrap(), "don't \"a\" 'a' $A \\ '\"'\n.\n");
    }

    #[test]
    fn blanks_in_quotes_and_behind_an_escape_end_no_word() {
        assert_eq!(split("a  b=\"c d\" 'e f'g h\\ i", '\\').unwrap(), ["a", "b=\"c d\"", "'e f'g", "h\\ i"]);
        assert_eq!(split("'a\\' b", '\\').unwrap(), ["'a\\'", "b"]);
        assert!(split("a \"b", '\\').unwrap_err().contains('"'));
        assert!(split("", '\\').unwrap().is_empty());
    }

    /// A text as a word that comes to it.
    fn quoted(text: &str) -> String {
        text.chars().flat_map(|c| ['\\', c]).collect()
    }

    proptest! {
        #[test]
        fn any_text_can_be_said_and_nothing_panics(texts in prop::collection::vec(".{1,12}", 0..5), noise in ".{0,40}") {
            let line = texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" ");
            let words = split(&line, '\\').unwrap();
            let said: Result<Vec<_>, _> = words.iter().map(|word| expanded(word)).collect();
            prop_assert_eq!(said.unwrap(), texts);
            for word in split(&noise, '\\').unwrap_or_default() {
                let _ = expanded(&word);
            }
        }
    }
}
