//! The chat template of a GGUF file: it formats a prompt so that the model answers it instead of continuing it.

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Content;
use jiff::Timestamp;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;

use minijinja::{Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat;
use serde::Serialize;

use crate::metadata::Metadata;

const NAME: &str = "chat template";

/// A message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Whose it is: `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }

    /// A user's prompt, after the system message if there is one.
    pub fn prompt(prompt: &str, system: Option<&str>) -> Vec<Self> {
        let system = system.map(|system| Self::new("system", system));
        system.into_iter().chain([Self::new("user", prompt)]).collect()
    }
}

/// Formats a prompt as a model was trained to expect it.
#[derive(Debug)]
pub struct ChatTemplate {
    /// `None` if the model file has no template.
    template: Option<Environment<'static>>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Reads the template from `content`. Without a template, prompts stay unchanged.
    ///
    /// # Errors
    ///
    /// If the template or the tokens it may use cannot be read.
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let metadata = Metadata::of(content);
        let tokens = metadata.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        let token = |key| -> Result<String> {
            let id = metadata.id(key)?;
            let token = id.and_then(|id| tokens.get(id as usize));
            Ok(token.copied().unwrap_or_default().to_owned())
        };
        Ok(Self {
            template: metadata
                .text("tokenizer.chat_template")?
                .map(environment)
                .transpose()
                .context("cannot read the chat template of the model file")?,
            bos: token("tokenizer.ggml.bos_token_id")?,
            eos: token("tokenizer.ggml.eos_token_id")?,
        })
    }

    /// The source of the template; empty if there is none.
    pub(crate) fn source(&self) -> String {
        let template = self.template.as_ref().and_then(|environment| environment.get_template(NAME).ok());
        template.map(|template| template.source().to_owned()).unwrap_or_default()
    }

    /// Whether the model file has a template.
    pub fn is_some(&self) -> bool {
        self.template.is_some()
    }

    /// The text after which the model answers the last of `messages`. If none of them is of the system, the template may
    /// insert a system message of its own.
    ///
    /// # Errors
    ///
    /// If the template refuses, or if there is more than a user's message but no template.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let Some(environment) = &self.template else {
            let [Message { role, content }] = messages else {
                bail!("the model file has no chat template, so it can answer one message, not {}", messages.len());
            };
            ensure!(role == "user", "the model file has no chat template, so there is no place for a {role} message");
            return Ok(content.clone());
        };
        environment
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages,
                    add_generation_prompt => true,
                    bos_token => self.bos,
                    eos_token => self.eos,
                })
            })
            .context("the chat template of the model file failed")
    }
}

fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    // Templates are written for these two settings, and for Python's methods on strings and lists.
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    // Templates of Llama 3.2 and Mistral Small name the day.
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        let now = Timestamp::now().to_zoned_datetime(TimeZone::UTC);
        strtime::format(&format, &now).map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment.add_template_owned(NAME, source.to_owned())?;
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Value;

    use super::*;
    use crate::metadata::tests::content;

    fn chat(template: &str) -> Result<ChatTemplate> {
        let tokens = ["<s>", "</s>"].map(|token| Value::String(token.to_owned()));
        ChatTemplate::from_gguf(&content([
            ("tokenizer.ggml.tokens", Value::Array(tokens.to_vec())),
            ("tokenizer.ggml.bos_token_id", Value::U32(0)),
            ("tokenizer.ggml.eos_token_id", Value::U32(1)),
            ("tokenizer.chat_template", Value::String(template.to_owned())),
        ]))
    }

    #[test]
    fn a_template_sees_messages_tokens_and_the_generation_prompt() -> Result<()> {
        let chat = chat(
            "{{ bos_token }}{% for message in messages %}\n\
             [{{ message['role'] }}] {{ message.content.strip() + eos_token }}\n\
             {% endfor %}\n\
             {% if add_generation_prompt %}[assistant]{% endif %}",
        )?;
        assert_eq!(chat.render(&Message::prompt(" Hi! ", None))?, "<s>[user] Hi!</s>\n[assistant]");
        assert_eq!(
            chat.render(&Message::prompt("Hi!", Some("Be brief.")))?,
            "<s>[system] Be brief.</s>\n[user] Hi!</s>\n[assistant]"
        );
        Ok(())
    }

    /// What the templates of Llama, Mistral, Qwen, Gemma and Phi are written with.
    #[test]
    fn templates_can_use_what_those_of_the_models_use() -> Result<()> {
        for (template, rendered) in [
            (
                "{%- set ns = namespace(last=messages|length - 1, found=false) %}\
                 {%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}\
                 {%- if not ns.found and m.role == 'user' and m.content is string %}\
                 {%- set ns.found = true %}{%- set ns.last = index %}{%- endif %}{%- endfor %}{{ ns.last }}",
                "1",
            ),
            (
                "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}\
                 {%- set rest = messages[1:] %}{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}\
                 {{- system ~ '|' ~ rest|length }}{% for m in rest %}{{ loop.first and loop.last }}{% endfor %}",
                "Be brief.|1True",
            ),
            ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools is none }}", "True"),
            ("{% if tools %}a{% elif tools is not none and enable_thinking is defined %}b{% else %}c{% endif %}", "c"),
            ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y')|length }}{% endif %}", "11"),
            ("{{ messages[1].content.split('x')[-1].lstrip('\\n').upper() }}", "HI "),
            ("{{ messages[1]['content'].startswith('a') and 'x' in messages[1].content }}", "True"),
            ("{{ messages[0] | tojson }}", "{\"role\":\"system\",\"content\":\" Be brief. \"}"),
            ("{{ {'a': 1}.get('b', 2) }}{{ messages[1].tool_calls is defined and messages[1].tool_calls }}", "2False"),
            ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') + m('b') }}", "<a><b>"),
            (
                "{% for m in messages %}{% if m.role not in ['user'] %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
                "user",
            ),
            ("{% if (messages[1].role == 'user') != (1 % 2 == 0) %}alternate{% endif %}", "alternate"),
        ] {
            assert_eq!(
                chat(template)?.render(&Message::prompt("a x\nhi ", Some(" Be brief. ")))?,
                rendered,
                "{template}"
            );
        }
        let error = chat("{% generation %}a{% endgeneration %}").expect_err("not known");
        assert!(format!("{error:#}").contains("unknown statement generation"), "{error:#}");
        Ok(())
    }

    #[test]
    fn a_prompt_is_neither_escaped_nor_run() -> Result<()> {
        let prompt = "<b> & \"c\" {{ 1 + 1 }} {% raw %}\n";
        assert_eq!(chat("{{ messages[0].content }}")?.render(&Message::prompt(prompt, None))?, prompt);
        Ok(())
    }

    #[test]
    fn without_a_template_the_prompt_is_unchanged() -> Result<()> {
        let chat = ChatTemplate::from_gguf(&content([]))?;
        assert_eq!(chat.render(&Message::prompt("Once upon", None))?, "Once upon");
        let error = chat.render(&Message::prompt("Once upon", Some("Be brief."))).expect_err("no place for it");
        assert!(error.to_string().contains("no chat template"), "{error}");
        Ok(())
    }

    #[test]
    fn a_template_can_refuse() -> Result<()> {
        let chat = chat("{{ raise_exception('system messages are ' ~ 'unknown') }}")?;
        let error = chat.render(&Message::prompt("Hi!", None)).expect_err("it refuses");
        assert!(format!("{error:#}").contains("system messages are unknown"), "{error:#}");
        Ok(())
    }

    #[test]
    fn a_broken_template_is_an_error() {
        let error = chat("{% for %}").expect_err("the loop has no variable");
        assert!(error.to_string().contains("cannot read the chat template"), "{error}");
    }
}
