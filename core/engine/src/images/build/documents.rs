//! Here-documents of a build file: lines that belong to an instruction, up to the one that a word `<<NAME` of it says
//! (<https://docs.docker.com/reference/dockerfile/#here-documents>).

/// One of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Document {
    /// The word that begins it, as it is written.
    pub(super) word: String,
    /// The line that ends it; `COPY` calls the file so.
    pub(super) name: String,
    /// Tabs that its lines begin with are none of it: `<<-NAME`.
    pub(super) indented: bool,
    /// Variables in it mean something: no part of its name is quoted.
    pub(super) expands: bool,
    /// Its lines as they are written.
    pub(super) raw: String,
}

impl Document {
    /// Its lines as they are meant.
    pub(super) fn text(&self) -> String {
        match self.indented {
            true => self.raw.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect(),
            false => self.raw.clone(),
        }
    }

    /// Takes its lines from those that come; whether its end is among them.
    pub(super) fn read<'a>(&mut self, lines: &mut impl Iterator<Item = (usize, &'a str)>) -> bool {
        for (_, line) in lines {
            let meant = if self.indented { line.trim_start_matches('\t') } else { line };
            if meant == self.name {
                return true;
            }
            self.raw.push_str(line);
            self.raw.push('\n');
        }
        false
    }
}

/// Those that a line begins, without their lines. A `<<` in quotes or within a word is none, nor is a shift.
pub(super) fn begun(line: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    let (mut quoted, mut blank) = (None, true);
    let mut chars = line.char_indices();
    while let Some((at, c)) = chars.next() {
        if quoted.is_none()
            && blank
            && let Some(document) = at_beginning(&line[at..])
        {
            // Its other characters begin nothing.
            chars.nth(document.word.chars().count().saturating_sub(2));
            documents.push(document);
            blank = false;
            continue;
        }
        match (c, quoted) {
            (c, Some(quote)) if c == quote => quoted = None,
            ('\\', quote) if quote != Some('\'') => drop(chars.next()),
            ('"' | '\'', None) => quoted = Some(c),
            _ => {}
        }
        blank = c.is_whitespace();
    }
    documents
}

/// The one that a text begins with. As in a shell, a number says which descriptor it is for.
fn at_beginning(text: &str) -> Option<Document> {
    let rest = text.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (indented, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
    if !rest.starts_with(|c: char| c.is_ascii_alphabetic() || matches!(c, '_' | '.' | '"' | '\'')) {
        return None;
    }
    let (mut name, mut quoted, mut expands, mut end) = (String::new(), None, true, rest.len());
    for (at, c) in rest.char_indices() {
        match (c, quoted) {
            (c, Some(quote)) if c == quote => quoted = None,
            (c, Some(_)) => name.push(c),
            ('"' | '\'', None) => (quoted, expands) = (Some(c), false),
            (c, None) if c.is_whitespace() || matches!(c, ';' | '&' | '|' | '<' | '>' | '(' | ')') => {
                end = at;
                break;
            }
            (c, None) => name.push(c),
        }
    }
    let word = text[..text.len() - rest.len() + end].to_owned();
    let whole = quoted.is_none() && !name.is_empty();
    whole.then_some(Document { word, name, indented, expands, raw: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(line: &str) -> Vec<(String, bool, bool)> {
        begun(line).into_iter().map(|found| (found.name, found.indented, found.expands)).collect()
    }

    #[test]
    fn words_begin_documents_where_a_shell_would_have_them() {
        let one = |name: &str, indented, expands| vec![(name.to_owned(), indented, expands)];
        assert_eq!(names("<<EOF"), one("EOF", false, true));
        assert_eq!(names("cat <<-'END OF' > /x"), one("END OF", true, false));
        assert_eq!(names("cat <<E\"O\"F>/x"), one("EOF", false, false));
        assert_eq!(names("(cat 3<<_a)"), one("_a", false, true));
        assert_eq!(names("<<A <<-B /x").len(), 2);
        assert_eq!(names("echo \\' <<A \\\"").len(), 1);
        let text = begun("x 3<<-\"A\"; y").remove(0);
        assert_eq!(text.word, "3<<-\"A\"");
        for none in [
            "echo '<<EOF' \"a <<EOF\"",
            "echo $((1 << 3)) <<<x",
            "$((1 <<2))",
            "a<<EOF",
            "<<\"EOF",
            "<<''",
            "<<",
        ] {
            assert!(names(none).is_empty(), "{none}");
        }
    }

    #[test]
    fn lines_are_taken_up_to_the_end() {
        let mut document = begun("<<-EOF").remove(0);
        let mut lines = "\ta\n\t\t\tb\n  EOF\nEOF \n\tEOF\nnext".lines().enumerate();
        assert!(document.read(&mut lines));
        assert_eq!(document.text(), "a\nb\n  EOF\nEOF \n");
        assert_eq!(document.raw, "\ta\n\t\t\tb\n  EOF\nEOF \n");
        assert_eq!(lines.next(), Some((5, "next")));
        assert!(!begun("<<EOF").remove(0).read(&mut "a\n EOF\n".lines().enumerate()));
    }
}
