//! A parser for Python pickles (protocols 0–5) that builds plain values and executes nothing.
//!
//! A pickle is a program for a stack machine. The machine here knows the data opcodes; a call (`REDUCE`, `NEWOBJ`,
//! `BUILD`) only records what would have been called with what, as an opaque [`Node::Object`]. Values live in one
//! arena and refer to each other by index, so cycles and shared values are harmless and nothing is dropped
//! recursively. Every length read from the file is checked against the bytes that are left before it is used.
//! What the objects mean (tensors, enums) is for the readers above this file.

mod view;

use std::collections::HashMap;

pub use view::View;

use crate::{Error, Result};

/// Index of a value in its [`Pickle`].
type Id = usize;

/// One Python value; children are indices.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits: little-endian two's complement.
    BigInt(Vec<u8>),
    Float(f64),
    Str(String),
    Bytes(Vec<u8>),
    /// List, set or frozenset.
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// `module name`.
    Global(String, String),
    /// A call that was recorded and not made, with the state that `BUILD` gave it. Items that `SETITEMS` or
    /// `APPENDS` gave to it (an OrderedDict's entries) are in `items`.
    Object {
        callable: Id,
        arguments: Id,
        state: Option<Id>,
        items: Vec<(Option<Id>, Id)>,
    },
    /// A reference to something outside of the pickle (torch: a storage).
    Persistent(Id),
}

/// A parsed pickle.
#[derive(Debug)]
pub struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// Parses one pickle.
    ///
    /// # Errors
    /// Truncated input, unknown opcodes, stack underflow: the message names the opcode and its offset.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut machine =
            Machine { bytes, at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        let root = machine.run()?;
        Ok(Self { nodes: machine.nodes, root })
    }

    pub fn root(&self) -> View<'_> {
        View::new(self, self.root)
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack where a MARK stands.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    fn fail(&self, what: impl std::fmt::Display) -> Error {
        Error::input(format!("broken pickle: {what} at byte {}", self.at))
            .next("the file is damaged or was not written by torch.save; use another checkpoint")
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        let n = usize::try_from(n).ok().filter(|&n| n <= left);
        let Some(n) = n else { return Err(self.fail(format!("it ends early, {left} bytes are left"))) };
        let slice = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(slice)
    }
    /// Little-endian unsigned integer of `n` ≤ 8 bytes.
    fn uint(&mut self, n: u64) -> Result<u64> {
        Ok(self.take(n)?.iter().rev().fold(0, |value, &b| value << 8 | u64::from(b)))
    }
    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let Some(end) = rest.iter().position(|&b| b == b'\n') else {
            return Err(self.fail("a line without an end"));
        };
        self.at += end + 1;
        Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
    }
    fn text(&mut self, n: u64) -> Result<Node> {
        Ok(Node::Str(String::from_utf8_lossy(self.take(n)?).into_owned()))
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }
    fn pop(&mut self) -> Result<Id> {
        // Nothing above a mark may be taken by an opcode that does not take the mark.
        if self.marks.last().is_some_and(|&mark| self.stack.len() <= mark) {
            return Err(self.fail("stack underflow"));
        }
        self.stack.pop().ok_or_else(|| self.fail("stack underflow"))
    }
    fn top(&self) -> Result<Id> {
        self.stack.last().copied().ok_or_else(|| self.fail("stack underflow"))
    }
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let Some(mark) = self.marks.pop() else { return Err(self.fail("no mark")) };
        Ok(self.stack.split_off(mark))
    }
    fn pairs(&self, items: &[Id]) -> Result<Vec<(Id, Id)>> {
        if !items.len().is_multiple_of(2) {
            return Err(self.fail("a key without a value"));
        }
        Ok(items.chunks_exact(2).map(|p| (p[0], p[1])).collect())
    }
    fn remember(&mut self, key: u64) -> Result<()> {
        let id = self.top()?;
        self.memo.insert(key, id);
        Ok(())
    }
    fn recall(&mut self, key: u64) -> Result<()> {
        let Some(&id) = self.memo.get(&key) else { return Err(self.fail(format!("memo {key} was never set"))) };
        self.stack.push(id);
        Ok(())
    }
    fn set_items(&mut self, pairs: Vec<(Id, Id)>) -> Result<()> {
        let target = self.top()?;
        match &mut self.nodes[target] {
            Node::Dict(items) => items.extend(pairs),
            Node::Object { items, .. } => items.extend(pairs.into_iter().map(|(k, v)| (Some(k), v))),
            _ => return Err(self.fail("items for something that is no dict")),
        }
        Ok(())
    }
    fn append(&mut self, values: Vec<Id>) -> Result<()> {
        let target = self.top()?;
        match &mut self.nodes[target] {
            Node::List(items) => items.extend(values),
            Node::Object { items, .. } => items.extend(values.into_iter().map(|v| (None, v))),
            _ => return Err(self.fail("elements for something that is no list")),
        }
        Ok(())
    }
    fn call(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let callable = self.pop()?;
        self.push(Node::Object { callable, arguments, state: None, items: Vec::new() });
        Ok(())
    }
    fn class(&mut self) -> Result<Id> {
        let (module, name) = (self.line()?, self.line()?);
        self.nodes.push(Node::Global(module, name));
        Ok(self.nodes.len() - 1)
    }

    fn run(&mut self) -> Result<Id> {
        loop {
            let op = self.take(1)?[0];
            if op == b'.' {
                return self.pop();
            }
            if !(self.scalar(op)? || self.container(op)? || self.reference(op)?) {
                return Err(self.fail(format!("unknown opcode 0x{op:02x}")));
            }
        }
    }

    /// Opcodes that push one atom. False: not one of them.
    fn scalar(&mut self, op: u8) -> Result<bool> {
        let node = match op {
            b'N' => Node::None,
            0x88 => Node::Bool(true),
            0x89 => Node::Bool(false),
            b'K' => Node::Int(self.uint(1)? as i64),
            b'M' => Node::Int(self.uint(2)? as i64),
            b'J' => Node::Int(i64::from(self.uint(4)? as u32 as i32)),
            0x8a | 0x8b => {
                let n = self.uint(if op == 0x8a { 1 } else { 4 })?;
                long(self.take(n)?)
            }
            b'I' | b'L' => {
                let line = self.line()?;
                match line.trim_end_matches('L') {
                    "00" => Node::Bool(false),
                    "01" => Node::Bool(true),
                    digits => digits.parse().map(Node::Int).map_err(|_| self.fail("an unreadable integer"))?,
                }
            }
            b'F' => self.line()?.parse().map(Node::Float).map_err(|_| self.fail("an unreadable float"))?,
            b'G' => {
                let mut bits = [0; 8];
                bits.copy_from_slice(self.take(8)?);
                Node::Float(f64::from_be_bytes(bits))
            }
            b'V' | b'S' => Node::Str(self.line()?.trim_matches(['\'', '"']).to_owned()),
            b'X' | b'T' | 0x8c | b'U' | 0x8d => {
                let n = self.uint(match op {
                    b'X' | b'T' => 4,
                    0x8d => 8,
                    _ => 1,
                })?;
                self.text(n)?
            }
            b'B' | b'C' | 0x8e | 0x96 => {
                let n = self.uint(match op {
                    b'B' => 4,
                    b'C' => 1,
                    _ => 8,
                })?;
                Node::Bytes(self.take(n)?.to_vec())
            }
            _ => return Ok(false),
        };
        self.push(node);
        Ok(true)
    }

    /// Opcodes that build and fill containers, and that move the stack.
    fn container(&mut self, op: u8) -> Result<bool> {
        match op {
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => {
                let id = self.top()?;
                self.stack.push(id);
            }
            b']' | 0x8f => self.push(Node::List(Vec::new())),
            b'l' | 0x91 => {
                let items = self.pop_mark()?;
                self.push(Node::List(items));
            }
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' | 0x90 => {
                let values = self.pop_mark()?;
                self.append(values)?;
            }
            b')' => self.push(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_mark()?;
                self.push(Node::Tuple(items));
            }
            0x85..=0x87 => {
                let mut items: Vec<Id> = (0..op - 0x84).map(|_| self.pop()).collect::<Result<_>>()?;
                items.reverse();
                self.push(Node::Tuple(items));
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b'd' => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(&items)?;
                self.push(Node::Dict(pairs));
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(vec![(key, value)])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(&items)?;
                self.set_items(pairs)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Opcodes for the memo, globals, calls and framing.
    fn reference(&mut self, op: u8) -> Result<bool> {
        match op {
            0x80 => {
                let protocol = self.uint(1)?;
                if protocol > 5 {
                    return Err(self.fail(format!("pickle protocol {protocol} (0 to 5 are known)")));
                }
            }
            // A frame's length is advice for buffering; the opcodes inside follow at once.
            0x95 => {
                self.uint(8)?;
            }
            b'p' | b'g' => {
                let key = self.line()?.parse().map_err(|_| self.fail("an unreadable memo index"))?;
                if op == b'p' { self.remember(key)? } else { self.recall(key)? }
            }
            b'q' | b'r' => {
                let key = self.uint(if op == b'q' { 1 } else { 4 })?;
                self.remember(key)?;
            }
            b'h' | b'j' => {
                let key = self.uint(if op == b'h' { 1 } else { 4 })?;
                self.recall(key)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'c' => {
                let id = self.class()?;
                self.stack.push(id);
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Node::Str(module), Node::Str(name)) = (&self.nodes[module], &self.nodes[name]) else {
                    return Err(self.fail("a global whose name is no text"));
                };
                self.push(Node::Global(module.clone(), name.clone()));
            }
            b'R' | 0x81 => self.call()?,
            0x92 => {
                // NEWOBJ_EX: class, args, kwargs. The keyword arguments are of no use to any reader here.
                self.pop()?;
                self.call()?;
            }
            b'i' => {
                let callable = self.class()?;
                let items = self.pop_mark()?;
                self.call_with(callable, items);
            }
            b'o' => {
                let mut items = self.pop_mark()?;
                if items.is_empty() {
                    return Err(self.fail("an object without a class"));
                }
                let callable = items.remove(0);
                self.call_with(callable, items);
            }
            b'b' => {
                let given = self.pop()?;
                let target = self.top()?;
                if let Node::Object { state, .. } = &mut self.nodes[target] {
                    *state = Some(given);
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id));
            }
            b'P' => {
                let name = self.line()?;
                self.nodes.push(Node::Str(name));
                self.push(Node::Persistent(self.nodes.len() - 1));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn call_with(&mut self, callable: Id, items: Vec<Id>) {
        self.nodes.push(Node::Tuple(items));
        let arguments = self.nodes.len() - 1;
        self.push(Node::Object { callable, arguments, state: None, items: Vec::new() });
    }
}

/// A LONG: little-endian two's complement of any length.
fn long(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::BigInt(bytes.to_vec());
    }
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut padded = [if negative { 0xff } else { 0 }; 8];
    padded[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(padded))
}
