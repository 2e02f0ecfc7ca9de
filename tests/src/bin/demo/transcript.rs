//! What the demo prints: numbered steps, command lines, rows. With colour only on a terminal that wants it.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};

use anyhow::Result;

/// Longer lines are cut, so that the transcript stays readable.
const WIDTH: usize = 104;

/// The demo's output.
pub(crate) struct Transcript {
    style: Style,
    steps: u32,
}

#[derive(Clone, Copy)]
enum Style {
    Plain,
    Colour,
}

impl Transcript {
    /// Prints to standard output.
    pub(crate) fn stdout() -> Self {
        let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let style = if wanted && io::stdout().is_terminal() { Style::Colour } else { Style::Plain };
        Transcript { style, steps: 0 }
    }

    /// A numbered step.
    pub(crate) fn step(&mut self, title: &str) -> Result<()> {
        self.steps += 1;
        let number = self.steps;
        self.blank()?;
        self.print(&format!("{number:>2}  "), BOLD, title)
    }

    /// A headline.
    pub(crate) fn headline(&self, text: &str) -> Result<()> {
        self.print("", BOLD, text)
    }

    /// A line of text.
    pub(crate) fn text(&self, text: &str) -> Result<()> {
        self.print("", PLAIN, text)
    }

    /// A detail of a step.
    pub(crate) fn detail(&self, text: &str) -> Result<()> {
        self.print("      ", PLAIN, &cut(text))
    }

    /// What was sent to a server.
    pub(crate) fn sent(&self, text: &str) -> Result<()> {
        self.print("    > ", PLAIN, &cut(text))
    }

    /// What came back.
    pub(crate) fn received(&self, text: &str) -> Result<()> {
        self.print("    < ", CYAN, &cut(text))
    }

    /// A command line for another shell, whole.
    pub(crate) fn command(&self, line: &str) -> Result<()> {
        self.print("", PLAIN, line)
    }

    /// A comment in a block for another shell, so that the block may be pasted as a whole.
    pub(crate) fn comment(&self, text: &str) -> Result<()> {
        self.print("", DIM, &format!("# {}", cut(text)))
    }

    /// What a command line printed. JSON is wrapped between its members, anything else cut.
    pub(crate) fn output(&self, line: &str) -> Result<()> {
        if !line.starts_with('{') {
            return self.print("", CYAN, &format!("#   {}", cut(line)));
        }
        let mut part = String::new();
        for member in line.split_inclusive(',') {
            if part.len() + member.len() > WIDTH && !part.is_empty() {
                self.print("", CYAN, &format!("#   {part}"))?;
                part.clear();
            }
            part += member;
        }
        self.print("", CYAN, &format!("#   {part}"))
    }

    /// What went wrong.
    pub(crate) fn failure(&self, text: &str) -> Result<()> {
        self.print("", RED, text)
    }

    /// An empty line.
    pub(crate) fn blank(&self) -> Result<()> {
        Ok(writeln!(io::stdout())?)
    }

    fn print(&self, lead: &str, colour: &str, text: &str) -> Result<()> {
        let mut out = io::stdout().lock();
        match self.style {
            Style::Colour if !colour.is_empty() => writeln!(out, "{lead}\x1b[{colour}m{text}\x1b[0m")?,
            _ => writeln!(out, "{lead}{text}")?,
        }
        Ok(out.flush()?)
    }
}

const PLAIN: &str = "";
const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";
const CYAN: &str = "36";

fn cut(text: &str) -> String {
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_owned(),
    }
}
