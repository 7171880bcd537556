//! Stages as a build's file has them, and what they need of one another. Nothing is read or run here.

use std::collections::BTreeSet;

use super::{
    file::{Copy, File, FileError, Instruction, Step},
    hint_of, nothing,
    stage::{Given, Globals},
};
use crate::EngineError;

/// A base with nothing in it.
const SCRATCH: &str = "scratch";

/// A stage as it is written: what it begins with, then its other steps.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) from: Step,
    pub(super) base: Base,
    pub(super) steps: Vec<Step>,
    /// It is no stage of the file, but an image that `COPY --from` names.
    pub(super) is_source: bool,
}

/// What a stage begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Base {
    Nothing,
    Stage(usize),
    Image(String),
}

impl Section {
    /// Splits a file into its stages, and adds the images that these only copy from.
    ///
    /// # Errors
    /// What is wrong with it, by its line.
    pub(super) fn all(
        file: File,
        globals: &mut Globals,
        given: &mut Given,
    ) -> Result<Vec<Self>, EngineError> {
        let mut sections: Vec<Section> = Vec::new();
        let mut sources: Vec<Section> = Vec::new();
        for step in file.steps {
            let line = step.line;
            let wrong =
                |message: String| EngineError::from(FileError { line, hint: hint_of(&message), message });
            if let Instruction::Copy(copy) = &step.instruction {
                sources.extend(check_copy(&sections, line, copy)?);
            }
            match (&step.instruction, sections.last_mut()) {
                (Instruction::From { image, .. }, _) => {
                    let image = globals.expand(image, file.escape).map_err(wrong)?;
                    let named = sections
                        .iter()
                        .position(|section| section.name() == Some(&image.to_ascii_lowercase()));
                    let base = match (image.as_str(), named) {
                        ("", _) => return Err(wrong("FROM names no image".into())),
                        (_, Some(stage)) => Base::Stage(stage),
                        (SCRATCH, _) => Base::Nothing,
                        _ => Base::Image(image),
                    };
                    sections.push(Section { from: step, base, steps: Vec::new(), is_source: false });
                }
                (_, Some(section)) => section.steps.push(step),
                (Instruction::Arg(arguments), None) => {
                    globals.declare(arguments, given, file.escape).map_err(wrong)?;
                }
                // The parser lets nothing else come first.
                (_, None) => {}
            }
        }
        for source in sources {
            // A stage that comes too late is no image.
            if let Some(name) = source.image()
                && sections.iter().any(|section| section.name() == Some(&name.to_ascii_lowercase()))
            {
                return Err(no_stage(source.from.line, name));
            }
            if sections.iter().all(|section| !section.is_source || section.base != source.base) {
                sections.push(source);
            }
        }
        Ok(sections)
    }

    /// An image that is only copied from.
    fn of_image(line: usize, image: &str) -> Self {
        let instruction = Instruction::From { image: image.to_owned(), stage: None };
        let from = Step { line, text: format!("COPY --from={image} (no stage, but an image)"), instruction };
        Self { from, base: Base::Image(image.to_owned()), steps: Vec::new(), is_source: true }
    }

    fn image(&self) -> Option<&str> {
        match &self.base {
            Base::Image(image) => Some(image),
            _ => None,
        }
    }

    fn name(&self) -> Option<&String> {
        match &self.from.instruction {
            Instruction::From { stage, .. } => stage.as_ref(),
            _ => None,
        }
    }
}

/// The stage that a text names: by its name or its number.
fn stage_named(sections: &[Section], text: &str, before: usize) -> Option<usize> {
    let lower = text.to_ascii_lowercase();
    let sections = &sections[..before];
    let named = sections.iter().rposition(|section| section.name() == Some(&lower));
    named.or_else(|| text.parse().ok().filter(|number| *number < before))
}

/// Where a stage copies from: an earlier one, or an image.
pub(super) fn source_named(sections: &[Section], text: &str, number: usize) -> Option<usize> {
    stage_named(sections, text, number)
        .or_else(|| sections.iter().position(|section| section.is_source && section.image() == Some(text)))
}

/// What can be said of a copy before anything is run; the image that it is from, if it is from one.
fn check_copy(sections: &[Section], line: usize, copy: &Copy) -> Result<Option<Section>, EngineError> {
    let mut source = None;
    match copy.from.as_deref() {
        Some(from) if from.contains('$') => {
            let hint = "FROM may have: make a stage by FROM $VARIABLE AS NAME, and copy from NAME".to_owned();
            let message = format!("--from={from} has a variable in it");
            return Err(FileError { line, message, hint }.into());
        }
        Some(from) if stage_named(sections, from, sections.len().saturating_sub(1)).is_none() => {
            if from.is_empty() || from == SCRATCH || from.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(no_stage(line, from));
            }
            source = Some(Section::of_image(line, from));
        }
        _ => {}
    }
    match &copy.chmod {
        Some(mode) if !mode.contains('$') && octal(mode).is_none() => Err(no_mode(line, mode)),
        _ => Ok(source),
    }
}

pub(super) fn no_stage(line: usize, name: &str) -> EngineError {
    let hint = "name a stage that comes before, or an image".to_owned();
    FileError { line, message: format!("there is no stage {name} before this one"), hint }.into()
}

/// Permission bits.
pub(super) fn octal(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777)
}

pub(super) fn no_mode(line: usize, text: &str) -> EngineError {
    let hint = "write octal digits, e.g. --chmod=0755".to_owned();
    FileError { line, message: format!("--chmod={text} is no mode"), hint }.into()
}

/// The stage to be built.
pub(super) fn wanted(sections: &[Section], target: Option<&str>) -> Result<usize, EngineError> {
    let stages = sections.iter().filter(|section| !section.is_source).count();
    let last = stages.checked_sub(1).ok_or_else(nothing)?;
    let Some(target) = target else { return Ok(last) };
    stage_named(sections, target, stages).ok_or_else(|| {
        let names: Vec<_> = sections.iter().filter_map(Section::name).map(String::as_str).collect();
        EngineError::NotFound {
            what: "stage",
            name: target.to_owned(),
            hint: match names.as_slice() {
                [] => "no stage of the file has a name; FROM IMAGE AS NAME gives one".into(),
                names => format!("there are {}", names.join(", ")),
            },
        }
    })
}

/// The stages that one needs, with itself.
pub(super) fn needed(sections: &[Section], target: usize) -> BTreeSet<usize> {
    let (mut needed, mut left) = (BTreeSet::new(), vec![target]);
    while let Some(number) = left.pop() {
        if !needed.insert(number) {
            continue;
        }
        let section = &sections[number];
        if let Base::Stage(base) = section.base {
            left.push(base);
        }
        left.extend(section.steps.iter().filter_map(|step| match &step.instruction {
            Instruction::Copy(copy) => source_named(sections, copy.from.as_deref()?, number),
            _ => None,
        }));
    }
    needed
}
