//! Answers: as a table for people, as JSON or YAML for programs.

use std::borrow::Cow;
use std::io::{Read, Write};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::failure::Failure;
use crate::json::Document;

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// The API's own names.
    Json,
    /// The same as YAML.
    Yaml,
    /// `get` only: the bytes of the value and nothing else.
    Raw,
}

/// Where answers go, and where values come from.
pub(crate) struct Output<'a> {
    /// The answer.
    pub(crate) out: &'a mut dyn Write,
    /// What is said beside it.
    pub(crate) notes: &'a mut dyn Write,
    /// What a command reads if it is told `-`.
    pub(crate) input: &'a mut dyn Read,
    /// How the answer looks.
    pub(crate) format: Format,
    /// Whether a person sees the answer.
    pub(crate) terminal: bool,
    /// Whether a person sees what is said beside it, and may be shown progress there.
    pub(crate) watched: bool,
}

impl Output<'_> {
    /// Prints one answer.
    pub(crate) fn show(
        &mut self,
        answer: &impl Serialize,
        table: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table | Format::Raw => self.out.write_all(table().as_bytes())?,
            Format::Json => {
                let text = serde_json::to_string_pretty(answer).map_err(|_| unprintable())?;
                writeln!(self.out, "{text}")?;
            }
            Format::Yaml => {
                let json = serde_json::value::to_raw_value(answer).map_err(|_| unprintable())?;
                self.out.write_all(yaml(&json)?.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Prints one answer of many that arrive over time, and lets the reader have it.
    pub(crate) fn show_next(
        &mut self,
        answer: &impl Serialize,
        line: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table | Format::Raw => writeln!(self.out, "{}", line())?,
            Format::Json => {
                let text = serde_json::to_string(answer).map_err(|_| unprintable())?;
                writeln!(self.out, "{text}")?;
            }
            Format::Yaml => {
                let json = serde_json::value::to_raw_value(answer).map_err(|_| unprintable())?;
                write!(self.out, "---\n{}", yaml(&json)?)?;
            }
        }
        self.out.flush()?;
        Ok(())
    }

    /// Prints bytes as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        Ok(self.out.write_all(bytes)?)
    }

    /// Says something beside the answer.
    pub(crate) fn note(&mut self, text: &str) -> Result<(), Failure> {
        Ok(writeln!(self.notes, "{}", printable(text))?)
    }
}

fn yaml(json: &RawValue) -> Result<String, Failure> {
    serde_saphyr::to_string(&Document::new(json)).map_err(|_| unprintable())
}

fn unprintable() -> Failure {
    Failure::strange_answer("something that this format cannot express; `-o json` may")
}

/// A table as kubectl prints it: capitals above, two spaces between, nothing else.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = empty_table();
    table.set_header(header.map(str::to_uppercase));
    table.add_rows(rows.into_iter().map(|row| row.map(|cell| printable(&cell).into_owned())));
    finish(&table)
}

/// One thing: a name and a value a line. What is empty is left out.
pub(crate) fn details<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut table = empty_table();
    let rows = rows.into_iter().filter(|(_, value)| !value.is_empty());
    table.add_rows(rows.map(|(name, value)| [format!("{name}:"), printable(&value).into_owned()]));
    finish(&table)
}

/// One line of columns that are at least this wide.
pub(crate) fn line<const N: usize>(columns: [(&str, usize); N]) -> String {
    let cells = columns.map(|(text, width)| format!("{:width$}", printable(text)));
    cells.join("  ").trim_end().to_owned()
}

fn empty_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn finish(table: &Table) -> String {
    // Every cell has a space on both sides: the left margin goes, so that the first column begins the line.
    table.lines().map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(&line).trim_end())).collect()
}

/// The text with control characters escaped: what a store holds must not steer the terminal.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect::<String>()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_begin_at_the_margin_and_escape_what_steers_terminals() {
        let text = table(
            ["name", "id"],
            [["a".to_owned(), "x\x1b[2J\ny".to_owned()], ["long name".into(), "z".into()]],
        );
        assert_eq!(text, "NAME       ID\na          x\\u{1b}[2J\\ny\nlong name  z\n");
    }

    #[test]
    fn details_leave_out_what_is_empty() {
        assert_eq!(details([("name", "a".to_owned()), ("namespace", String::new())]), "name:  a\n");
    }
}
