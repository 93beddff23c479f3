//! Looking at the values of a parsed pickle.

use super::{Id, Node, Pickle};

/// A value of a pickle, to be looked at.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pickle: &'a Pickle,
    id: Id,
}

impl<'a> View<'a> {
    pub(super) fn new(pickle: &'a Pickle, id: Id) -> Self {
        Self { pickle, id }
    }
    fn node(self) -> &'a Node {
        // Ids are made by the machine from indices of this very arena.
        &self.pickle.nodes[self.id]
    }
    fn at(self, id: Id) -> View<'a> {
        View { pickle: self.pickle, id }
    }

    pub fn as_i64(self) -> Option<i64> {
        match self.node() {
            Node::Int(i) => Some(*i),
            Node::Bool(b) => Some(i64::from(*b)),
            _ => None,
        }
    }
    /// Number as f64; integers included.
    pub fn as_f64(self) -> Option<f64> {
        match self.node() {
            Node::Float(f) => Some(*f),
            _ => self.as_i64().map(|i| i as f64),
        }
    }
    /// Text; of an enum member (a call of its class with one string), that string.
    pub fn as_str(self) -> Option<&'a str> {
        match self.node() {
            Node::Str(s) => Some(s),
            Node::Object { arguments, .. } => match self.at(*arguments).node() {
                Node::Tuple(items) if items.len() == 1 => match self.at(items[0]).node() {
                    Node::Str(s) => Some(s),
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        }
    }
    /// Elements of a list, set or tuple.
    pub fn elements(self) -> Option<Vec<View<'a>>> {
        match self.node() {
            Node::List(items) | Node::Tuple(items) => Some(items.iter().map(|&id| self.at(id)).collect()),
            _ => None,
        }
    }
    /// Entries of a dict, or of an object that was filled like one (OrderedDict).
    pub fn entries(self) -> Option<Vec<(View<'a>, View<'a>)>> {
        match self.node() {
            Node::Dict(items) => Some(items.iter().map(|&(k, v)| (self.at(k), self.at(v))).collect()),
            Node::Object { items, .. } => {
                Some(items.iter().filter_map(|&(k, v)| k.map(|k| (self.at(k), self.at(v)))).collect())
            }
            _ => None,
        }
    }
    /// Value of a string key of a dict.
    pub fn get(self, key: &str) -> Option<View<'a>> {
        // The last of equal keys wins, as in Python.
        let found = |&&(k, _): &&(Id, Id)| matches!(self.at(k).node(), Node::Str(s) if s == key);
        match self.node() {
            Node::Dict(items) => items.iter().rev().find(found).map(|&(_, v)| self.at(v)),
            _ => self.entries()?.into_iter().rev().find(|(k, _)| k.as_str() == Some(key)).map(|(_, v)| v),
        }
    }
    /// `module name` of a global.
    pub fn as_global(self) -> Option<(&'a str, &'a str)> {
        match self.node() {
            Node::Global(module, name) => Some((module, name)),
            _ => None,
        }
    }
    /// What a recorded call would have called, and its arguments.
    pub fn as_call(self) -> Option<(View<'a>, Vec<View<'a>>)> {
        match self.node() {
            Node::Object { callable, arguments, .. } => {
                Some((self.at(*callable), self.at(*arguments).elements().unwrap_or_default()))
            }
            _ => None,
        }
    }
    /// The state that an object was given.
    pub fn state(self) -> Option<View<'a>> {
        match self.node() {
            Node::Object { state, .. } => state.map(|id| self.at(id)),
            _ => None,
        }
    }
    pub fn as_persistent(self) -> Option<View<'a>> {
        match self.node() {
            Node::Persistent(id) => Some(self.at(*id)),
            _ => None,
        }
    }
    /// Plain JSON of the value: enums as their text, other objects as null. Nesting deeper than `depth` is null.
    pub fn to_json(self, depth: usize) -> serde_json::Value {
        // Values may be shared, so that a short pickle can stand for more of them than memory holds.
        const MOST: usize = 1 << 20;
        self.json(depth, &mut { MOST })
    }

    /// `left`: values that may still be written; null from there on.
    fn json(self, depth: usize, left: &mut usize) -> serde_json::Value {
        use serde_json::Value as J;
        if depth == 0 || *left == 0 {
            return J::Null;
        }
        *left -= 1;
        match self.node() {
            Node::Bool(b) => J::Bool(*b),
            Node::Int(i) => J::from(*i),
            Node::Float(f) => super::super::json::number(*f),
            Node::List(_) | Node::Tuple(_) => {
                J::Array(self.elements().unwrap_or_default().into_iter().map(|v| v.json(depth - 1, left)).collect())
            }
            Node::Dict(_) => J::Object(
                self.entries()
                    .unwrap_or_default()
                    .into_iter()
                    .filter_map(|(k, v)| Some((k.as_str()?.to_owned(), v.json(depth - 1, left))))
                    .collect(),
            ),
            _ => self.as_str().map_or(J::Null, J::from),
        }
    }
}
