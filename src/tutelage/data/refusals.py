"""How stock refusals begin, in six languages: patterns to be matched at an answer's start.

Apart from the filter, since they are data: a phrase or a language more is a line here.
"""

import re

# A stock refusal is an apology before "I cannot" and what assistants say they cannot; or "as an AI,
# I ..."; or "I am an AI and cannot"; or, without an apology, "I cannot help you with that".
_EN_AI = r"an? (?:large |helpful )?(?:ai|artificial intelligence|language model)" + (
    r"(?: (?:language )?model| assistant| chatbot| system)?(?: (?:trained|developed|made) by \w+)?"
)
_EN_CANNOT = r"i(?: can(?:'?t|not| not)| won't|(?:'m| am) (?:not able|unable) to)"
_EN_SORRY = r"(?:i'm|i am) (?:very |really |so )?sorry|sorry|(?:my )?apologies|i apologi[sz]e"
_DE_AI = r"(?:große[sn]? |künstliche )?(?:ki|intelligenz|sprachmodell)" + (
    r"(?:[- ](?:sprachmodell|modell|assistent(?:in)?|chatbot|system))?"
)
_DE_WITH = r"(?:dabei|damit|hierbei|(?:bei|auf) (?:dies|solch|ihr|dein)\w*(?: \w+)?)"
_DE_SORRY = r"(?:es )?tut mir (?:sehr |wirklich )?leid|entschuldigung|leider|ich bedau[er]+e"
_ES_AI = r"(?:una? )?(?:gran )?(?:ia|inteligencia artificial|modelo|asistente)" + (
    r"(?: (?:virtual|de (?:ia|inteligencia artificial|lenguaje)))*"
)
_ES_SORRY = r"lo siento|lo lamento|perd[oó]n|disculp[ae]|lamentablemente|desafortunadamente"
_FR_AI = r"(?:une? )?(?:grand )?(?:ia|intelligence artificielle|modèle|assistante?)" + (
    r"(?: (?:virtuel(?:le)?|ia|de langage|d'ia))*"
)
_FR_SORRY = r"(?:je suis )?(?:vraiment )?(?:désolée?|navrée?)|je m'excuse|malheureusement"
_ZH_AI = r"(?:一[个個名款位])?(?:ai|人工智[能慧]|大?型?[语語]言模型|智能助手|[虚虛][拟擬]助手)" + (
    r"(?:大?[语語]言|大?模型|助手|[机機]器人|程序|系[统統])*"
)
_ZH_CANNOT = r"我(?:目前|[暂暫][时時]|[还還])?(?:[无無]法|不能[够夠]?|[没沒]有?[办辦]法)"
_ZH_YOU = r"(?:[为為向给給][您你])?(?:直接|继续|[繼继][续續])?"
_JA_DOES = r"(?:お手伝い|お答え|お応え|お力に|お助け|ご?(?:提供|対応|回答)|生成|作成|支援|サポート)"
_JA_CANNOT = r"(?:(?:でき|出来|なれ)(?:ません|ない)|(?:でき|いたし|なり)かね)"
_PHRASES = {
    "en": (
        rf"(?:{_EN_SORRY}|unfortunately)[,.;]? (?:but )?(?:as {_EN_AI}, )?{_EN_CANNOT} (?:\w+ly )?"
        r"(?:assist|comply|fulfil+|help (?:you )?with|provide|generate|create|produce|engage"
        r"|discuss|participate|support|answer|respond|access|browse|continue|do (?:that|this)"
        r"|(?:write|complete) (?:that|this|such|any|your))\b",
        rf"as {_EN_AI},? (?:i|my|it is not|it's not)\b",
        rf"i(?:'m| am) (?:just |only )?{_EN_AI}\b[^.\n]{{,60}}"
        r"\b(?:can't|cannot|don't|do not|unable|not able)\b",
        rf"{_EN_CANNOT} (?:(?:assist|help) (?:you )?with (?:that|this|your)|(?:comply|assist) with"
        r"|fulfil\w* (?:that|this|your)|(?:provide|create|generate|write|discuss|engage in) (?:such"
        r"|content|instructions|guidance|assistance|explicit|harmful|illegal))\b",
    ),
    "zh": (
        r"(?:很|非常|十分|真的)?(?:抱歉|[对對]不起|不好意思)[,，。!！\s]*(?:但是?|不[过過])?"
        rf"(?:[作身][为為]{_ZH_AI}[,，]?)?{_ZH_CANNOT}{_ZH_YOU}"
        r"(?:提供|回答|[协協]助|[帮幫](?:助|[您你])|[满滿]足|[执執]行|生成|[参參][与與]|[讨討][论論]"
        r"|[处處]理|[访訪][问問]|支持|完成[您你这這该該]|[这這][个個样樣])",
        rf"[作身][为為]{_ZH_AI}[,，]?\s*[我本]",
        rf"我[只仅僅]?是{_ZH_AI}[^。\n]{{,20}}(?:[无無]法|不能|[没沒]有)",
        rf"{_ZH_CANNOT}{_ZH_YOU}(?:[协協]助|[满滿]足|[回提][答供])"
        r"(?:[您你]|[这這此该該]|相[关關]|任何)",
    ),
    "de": (
        rf"(?:{_DE_SORRY})[,.]? (?:aber |doch )?(?:als {_DE_AI} )?(?:ich kann|kann ich) "
        rf"(?:(?:ihnen|dir|leider|{_DE_WITH}|keine \w+|(?:dies|ihr|dein)\w+ \w+|das) )*(?:nicht )?"
        r"(?:weiter)?(?:helfen|beantworten|bereitstellen|erstellen|generieren|unterstützen"
        r"|erfüllen|nachkommen|geben|liefern)\b",
        rf"als (?:eine? )?{_DE_AI},? (?:kann|habe|bin|darf|verfüge|besitze) ich\b",
        rf"ich bin (?:nur |lediglich )?eine? {_DE_AI}\b[^.\n]{{,60}}\b(?:nicht|keine?n?)\b",
        rf"ich kann (?:ihnen |dir )?(?:leider )?{_DE_WITH} (?:leider )?nicht (?:weiter)?helfen\b",
    ),
    "es": (
        rf"(?:{_ES_SORRY})[,.]? (?:pero )?(?:como {_ES_AI}, )?no (?:puedo|soy capaz de) "
        r"(?:(?:ayudar|asistir)(?:te|le)? (?:con|en) (?:es[aeot]\w*|tu|su)|proporcionar|cumplir"
        r"|responder|generar|crear|ofrecer|brindar|acceder|participar|hacer es[ot]o?)\b",
        rf"como {_ES_AI},? (?:no|yo|puedo|carezco)\b",
        rf"(?:s[oó]lo )?soy (?:s[oó]lo )?{_ES_AI}\b[^.\n]{{,60}}\bno (?:puedo|tengo|soy)\b",
        r"no puedo (?:ayudar(?:te|le)? (?:con|en) (?:es[aeot]\w*|tu|su)"
        r"|cumplir con (?:es[aeot]\w*|tu|su))\b",
    ),
    "fr": (
        rf"(?:{_FR_SORRY})[,.]? (?:mais )?(?:en tant qu(?:e |'){_FR_AI}, )?"
        r"je ne (?:peux|puis|suis)(?: pas)?(?: (?:en mesure|capable) (?:de |d'))?\s?"
        r"(?:vous |t'|te )?(?:(?:aider|assister) (?:à|avec|dans) (?:ce|cette|cela|ça|votre|ta)"
        r"|fournir|répondre à|générer|créer|satisfaire|accéder|effectuer|donner suite|participer à"
        r"|faire (?:ça|cela))\b",
        rf"en tant qu(?:e |'){_FR_AI},? (?:je|j'|il m|mon|ma)",
        rf"je (?:ne )?suis (?:qu')?{_FR_AI}\b[^.\n]{{,60}}\bje n(?:e |')",
        r"je ne peux pas (?:vous |t')?(?:aider|assister) (?:à|avec|dans) "
        r"(?:ce|cette|cela|ça|votre|ta)\b",
    ),
    "ja": (
        r"(?:大変|誠に)?(?:申し訳(?:ありません|ございません|ないです)|すみません|ごめんなさい|恐れ入ります"
        rf"|残念ながら)(?:が|けど)?[、。,\s]*[^。\n]{{,50}}?{_JA_DOES}"
        rf"[をにはが]?(?:する|行う)?(?:こと)?[はがも]?{_JA_CANNOT}",
        r"(?:私は)?(?:ai|人工知能|大?規?模?言語モデル)(?:言語モデル|アシスタント|モデル)?"
        r"(?:として|である|なので|ですので|のため)[、,]?[^。\n]{,50}?"
        rf"(?:{_JA_CANNOT}|ありません|(?:お|い)りません|持っていません|ございません)",
    ),
}
REFUSALS = {code: re.compile("|".join(parts)) for code, parts in _PHRASES.items()}
"""By language; each matches from the beginning of a folded answer."""
